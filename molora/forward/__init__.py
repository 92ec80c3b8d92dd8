"""What one forward pass does: the layers' experts, gates and losses at work.

One forward of an adapted layer, told once. Five files have all of it for a plain top-k mixture:

1. `tuner/layer.py` `Linear.forward`: y = base(x), and then for each active adapter the mount of it here.
2. `forward/input_group.py` `add_experts`: the first layer that reads an x computes for all that read it (q, k and v), the
   others find their part waiting. `forward/dispatch.py` says in which of three equal ways; dense is the plain one.
3. `forward/dense.py` `dense_parts`: one product of x with the A of all experts of all these layers, and with the gate's
   rows; the gate's weights; a part for each layer.
4. `gates/gate.py` `Gate.forward`: router logits to weights over the experts, zero outside the best k.
5. `experts/kernel.py`: `shrink` is h = x Aᵀ, `weigh` scales h by the weights, `expand` adds h B to y.

What else runs on the way answers one question each, nearly always with "nothing special": `rows.py` (are these rows
the tokens of known samples?), `calls/decide.py` (did the call ask for tasks or experts?), `group_routing.py` (was this
gate asked already in this forward?).
"""
