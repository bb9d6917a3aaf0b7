from tav_model.files import (  # noqa: F401
    atomic_file, atomic_folder, digest, load_tensors, read_json, save_tensors, write_json, write_text,
)
