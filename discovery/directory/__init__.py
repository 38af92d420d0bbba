"""Meshes and their nodes as their publishers tell of them: who is there, who is to be believed, for how long."""

from discovery.directory.book import Directory
from discovery.directory.entries import (
    ENTRIES_PER_CALL,
    Entry,
    Remote,
    decode_entries,
    encode_entries,
    entry_of,
)
from discovery.directory.events import (
    Behind,
    Dropped,
    Event,
    Expired,
    ImpostorSeen,
    Pinned,
    PublisherChanged,
    Revived,
    RowsChanged,
    Seen,
)
from discovery.directory.listing import DirectoryConfig, Impostor, Listing, material

__all__ = [
    "ENTRIES_PER_CALL",
    "Behind",
    "Directory",
    "DirectoryConfig",
    "Dropped",
    "Entry",
    "Event",
    "Expired",
    "Impostor",
    "ImpostorSeen",
    "Listing",
    "Pinned",
    "PublisherChanged",
    "Remote",
    "Revived",
    "RowsChanged",
    "Seen",
    "decode_entries",
    "encode_entries",
    "entry_of",
    "material",
]
