"""stub"""
from weightlift.dtypes import SAFETENSORS
DTYPES = tuple(SAFETENSORS.values())
def claims(head): return False
def read_shard(file, rules): raise NotImplementedError
