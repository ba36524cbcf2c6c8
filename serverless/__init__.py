"""The same engine as an AWS Lambda container: API Gateway in front, or files dropped into S3."""
