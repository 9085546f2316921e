"""What runs a method: the training loop, the evaluator, checkpoints, devices, processes, and recordings of a step."""
