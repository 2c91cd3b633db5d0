"""Where bytes lie: objects in S3, Google or Azure storage, or in a folder, behind one protocol.

store           the protocol of a store
open            makes the store that a URI names
folder          a store in a folder (file://)
s3              S3, over connections of our own; s3_by_botocore moves the bytes where those cannot
gs_az           Google and Azure storage, by obstore
connection      one HTTP connection that receives into memory of the caller
retry           how often and when a request is sent again
"""
