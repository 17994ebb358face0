"""Jobs that are run again draw the same pictures again, which takes most of their time."""

import copyreg
import hashlib
import io
import pickle
import shutil

import pytest

from fkv.evaluation import drawing


class Content(pickle.Pickler):
    """All that a figure is made of, the same for one that is made again."""

    def persistent_id(self, value):
        return "figure" if value is drawing._figure_type() else None  # which is no module's

    def reducer_override(self, value):
        from matplotlib.transforms import TransformNode

        if not isinstance(value, TransformNode):
            return NotImplemented
        state = {name: x for name, x in vars(value).items() if name != "_parents"}  # by their ids
        return copyreg.__newobj__, (type(value),), state


@pytest.fixture(scope="package", autouse=True)  # other tests look at how files are written
def pictures_are_drawn_once(tmp_path_factory):
    """A figure that is saved again is a copy."""
    kept, draw = tmp_path_factory.mktemp("pictures"), drawing.save

    def save(figure, path):
        content = io.BytesIO()
        try:
            Content(content).dump(figure)
        except (pickle.PicklingError, AttributeError, TypeError):
            return draw(figure, path)
        there = kept / f"{hashlib.sha256(content.getvalue()).hexdigest()}{path.suffix}"
        if not there.exists():
            draw(figure, there)
        for suffix in {path.suffix, ".pdf" if path.suffix == ".png" else path.suffix}:
            shutil.copyfile(there.with_suffix(suffix), path.with_suffix(suffix))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save", save)
        yield
