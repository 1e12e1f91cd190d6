"""Models: `make(...) -> Model` per architecture, and combinators from Model to Model."""
