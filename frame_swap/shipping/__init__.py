"""What a compile needs of the program, made to travel: the graph, its settings, its operators. Knows no frames."""
