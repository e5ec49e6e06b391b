"""Late guards: conditions on sizes that a compile adds after Dynamo has closed the frame's own guards.

A worker finds them (`farm`), `condition` turns them into a predicate over the graph's inputs (with the top-level
`guards`), `codegen` writes that into the frame, and `specialiser` asks for code that fits the calls it turns away.
"""
