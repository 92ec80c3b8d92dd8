"""Names of attention and feed-forward linears in transformers' models, as patterns for `target_modules`."""

from __future__ import annotations

FEED_FORWARD = (
    r"(.*\.)?(gate_proj|up_proj|down_proj|gate_up_proj|c_fc|mlp\.c_proj|fc1|fc2|lin1|lin2|wi|wi_0|wi_1|wo"
    r"|dense_h_to_4h|dense_4h_to_h|intermediate\.dense|layers?\.\d+\.output\.dense)"
)
ATTENTION = (
    r"(.*\.)?(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|query|key|value|attention\.output\.dense|c_attn"
    r"|attn\.c_proj|q_lin|k_lin|v_lin|out_lin|query_key_value|(SelfAttention|EncDecAttention)\.[qkvo])"
)
QUERY_VALUE = r"(.*\.)?(q_proj|v_proj|query|value|q_lin|v_lin|c_attn|query_key_value|(SelfAttention|EncDecAttention)\.[qv])"
# What closes attention and what closes the feed-forward: each reads the block's inner state and adds to the stream.
OUTPUTS = (
    r"(.*\.)?(o_proj|out_proj|out_lin|attn\.c_proj|attention\.output\.dense|(SelfAttention|EncDecAttention)\.o|down_proj"
    r"|mlp\.c_proj|fc2|lin2|wo|dense_4h_to_h|layers?\.\d+\.output\.dense)"
)
