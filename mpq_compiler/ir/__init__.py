"""The program and its meaning: graph, operators, interpreters, rules, text, bytes."""
