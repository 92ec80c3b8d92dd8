"""Gates: who decides the weights of the experts."""
