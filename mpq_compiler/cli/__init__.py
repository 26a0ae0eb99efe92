"""``mpqc``: one file a command; `mpqc` has the parser and the exits."""
