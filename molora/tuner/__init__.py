"""The PEFT method: config, layers, model, and the verbs that change experts."""
