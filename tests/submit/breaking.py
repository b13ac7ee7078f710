"""Ways to break a folder: each a function of its path."""

import json
import re


def edit_json(**changes):
    """Sets fields of submission.json by dotted path; None removes one; a function gets the old value."""

    def broken(folder):
        path = folder / "submission.json"
        value = json.loads(path.read_text())
        for name, new in changes.items():
            box, *rest = value, *name.split("__")
            for key in rest[:-1]:
                box = box[key]
            if new is None:
                del box[rest[-1]]
            else:
                box[rest[-1]] = new(box[rest[-1]]) if callable(new) else new
        path.write_text(json.dumps(value))

    return broken


def edit(name, old, new, count=0):
    """Replaces a pattern in a file, or in all that a glob finds; it must be there."""

    def broken(folder):
        for path in folder.glob(name):
            text = path.read_bytes().decode("latin-1")
            again = re.sub(old, new, text, count=count, flags=re.M)
            assert again != text, f"{path.name} has no {old}"
            path.write_bytes(again.encode("latin-1"))

    return broken


def write(name, data):
    def broken(folder):
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return broken


def remove(name):
    return lambda folder: (folder / name).unlink()


def both(*ways):
    def broken(folder):
        for way in ways:
            way(folder)

    return broken


def as_record(folder):
    """The same folder on the record track: its runs look as if they had scored the official split."""
    edit("train_seed*.log", r"val_documents:\d+", "val_documents:50000")(folder)
    edit("train_seed*.log", r"target_bytes:\d+", "target_bytes:151078222")(folder)
    edit_json(track="10min_16mb")(folder)
    place = folder.parent.parent / "track_10min_16mb"
    place.mkdir()
    return folder.rename(place / folder.name)
