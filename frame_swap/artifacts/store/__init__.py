"""Artifacts that outlive the process: a region's content is looked up here before anybody compiles it.

`key` says which results are interchangeable; `disk` keeps them in a folder of this user's, and lets one of several
processes compile what all of them want; `chosen` is the store in force. What uses a store knows it as a `Store`.
"""
