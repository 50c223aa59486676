"""The Hugging Face hub: download checkpoints, upload the files of a release.

```
client      the hub's client, the token, retries, and the hub's errors as our own
download    fetch the files of one commit in a child program, and end a transfer that hangs
downloader  that child program: fetch, and compare each file with the hub's list
checkpoint  a model as its authors published it, verified before anything reads it
lock        pin a model's commit and the digest of every file
upload      send files to the hub's storage before a commit names them
```

Other packages call ``pull_checkpoint``, ``read_lock``, ``upload_variant`` and, around every request
of their own, ``client.convert_errors``. Releases are defined in ``quant.release``.
Two rules hold everywhere. The token comes from HF_TOKEN only, and is in no error and no log.
Nothing is read before its digest was compared with the hub's list.
"""
