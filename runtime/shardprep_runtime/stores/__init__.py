"""Where bytes lie: objects in S3, Google or Azure storage, or in a folder, behind one protocol.

store           the protocol of a store
open            makes the store that a URI names
folder          a store in a folder (file://)
s3              S3, the store; s3_upload puts objects in parts
s3_client       small requests of S3: credentials, signing, retries
s3_answers      what an answer of S3 means
s3_native       moves the bytes of S3 over connections of our own; s3_by_botocore, where those cannot
gs_az           Google and Azure storage, by obstore
connection      one HTTP connection that receives into memory of the caller
retry           how often and when a request is sent again
"""
