"""An S3-speaking server over a folder, for tests and the demo: strict about what clients send, faulty when told to be.

For tests: `with S3Server(folder) as server`. As a program: see `__main__`. Only the standard library is needed. What S3
has and this has not (CRC32C and CRC64NVME, for two) is refused with 501, never ignored.

    server      the process, for tests
    connection  one connection: request in, answer out
    service     which operation a request asks for
    buckets, objects, uploads   the operations
    signatures  Signature Version 4
    faults      what a fault does to an answer
    bodies      bodies of requests, and their checksums
    folder      objects as files
    messages    requests, responses, errors and XML
    board       what all connections share
"""

from .folder import file_name
from .server import S3Server

__all__ = ["S3Server", "file_name"]
