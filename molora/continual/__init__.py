"""Tasks one after another: strategies that keep the old ones, a router that names them, and the sequence runner."""
