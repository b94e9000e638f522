"""Bundles and replies in an object store instead of in Flower's messages.

`links` and `transfer`: one object by a link, all that a site needs. `objects`: a run's objects, as the server sees
them. `messages`: what Flower's messages say of them; `at_site` and `at_server`: each end's half.
"""
