"""The parts of training: objective, optimizers, interventions, validation, requests to stop."""
