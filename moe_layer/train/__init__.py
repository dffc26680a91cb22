"""A small decoder trained from one YAML file: `moe-layer train CONFIG`."""
