"""Messages on PostgreSQL alone: topics, which every subscriber follows.

`topics` is the interface, `messages` and `cursors` its values. `reading` and `wakeups` talk to the
database, `follower` reads once for everybody in this process and keeps a `feed` per topic, `schema` installs
the tables.
"""

from dbgate.messaging.messages import Message, Page, Published
from dbgate.messaging.schema import migrate
from dbgate.messaging.topics import Topic, Topics

__all__ = ["Message", "Page", "Published", "Topic", "Topics", "migrate"]
