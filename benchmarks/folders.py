"""The two folders that every benchmark asks for."""

from absl import flags

ZOO_DIR = flags.DEFINE_string("zoo_dir", "runs/zoo", "folder that keeps the trained models")
OUT_DIR = flags.DEFINE_string("out_dir", "runs/benchmarks", "folder for tables and figures")
PUBLISH = flags.DEFINE_bool("publish", False, "replace what the package and its docs hold of this benchmark")
