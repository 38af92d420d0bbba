"""The backbone: how meshes hear of each other, one signed summary a mesh.

A backbone carries summaries and judges none: what arrives is handed on as it came, with its age, and the directory
decides by the mesh's own signature. It says at once what is news, and stays quiet where nothing changes. What is
carried here is little and soft; the rows behind a summary come over SSH from the publisher that it names.

`PoolBackbone` is a gossip pool between the candidates of all meshes, on the ports that they have anyway. Where a NATS
cluster is given, `backbone.nats` takes its place; it is imported by name, as its library is an extra.
"""

from discovery.backbone.pool import BACKBONE, RENEWAL_TOPIC, PoolBackbone

__all__ = ["BACKBONE", "RENEWAL_TOPIC", "PoolBackbone"]
