"""Parameters of other libraries' attention layers: one room a library."""
