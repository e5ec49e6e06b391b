"""Capture in the background: a call that no cache entry fits runs as plain Python, and a thread captures its frame.

A later call's callback checks what the thread has got, and hands it to Dynamo. From then on the frame is like one
that was captured in its call. Knows no graphs.
"""
