"""What stages share: machinery on models, above the face. `qpipe.model` says what a model is."""
