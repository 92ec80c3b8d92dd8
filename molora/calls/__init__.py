"""Who asked for what: task ids, the call they belong to, the weights they decide, and what was counted."""
