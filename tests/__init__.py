"""A package, so that its modules are found before those of any installed package called `tests`."""
