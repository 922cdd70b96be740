"""The command line: one file per feature word, `main` puts them together.

    durable dev       an engine in the foreground, with what happens in it
    durable runs      look at runs and act on them, as an API node: nothing is executed here
    durable doctor    is everything as it should be, and if not, what to do

Nothing here imports an engine, a store or rich before a command needs it. What comes out of a store is shown through
`text.safe`: no payload, name or error of a run can steer a terminal.
"""
