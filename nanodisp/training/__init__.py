"""What a training step is made of: objective, optimizers, interventions, validation."""
