"""The model that comes with the package, and what `lfm2cpp demo` does with it."""
