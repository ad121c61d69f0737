"""The demo: a world of arbitrary facts in which knowledge and reasoning pattern are set apart."""
