"The study of body parts on the smallest profile, and mirror images whose classes have sides."
import json

import numpy as np
import pytest
import torch
from torch import nn

from wsss_nb.data.blocks import Augment
from wsss_nb.data.densepose import MIRRORED
from wsss_nb.data.items import UNLABELLED, VOID, InputError
from wsss_nb.segment.frozen import frozen_learner
from wsss_nb.segment.nets import SegmentNet
from wsss_nb.segment.predict import Segmenter, check_swap, load_segmenter, swap_classes
from wsss_nb.segment.spml import load_spml, spml_learner
from wsss_nb.segment.spread import Embedder, load_embedder
from wsss_nb.study import parts
from wsss_nb.study.cli import main
from wsss_nb.study.spml import LabelsStudy, short_frozen
from wsss_nb.study.tables import Table

SWAP = MIRRORED[:15].tolist()


def quiet(text): pass


class Sides(nn.Module):
    "Calls the left third of a picture class 1 and the right third class 2: right for whoever is not mirrored."
    def forward(self, x):
        at = torch.linspace(0, 1, x.shape[-1]).expand(len(x), *x.shape[2:])
        return 9. * torch.stack([(at > 1 / 3) & (at < 2 / 3), at <= 1 / 3, at >= 2 / 3], 1).float()


def sided(sides):
    net = SegmentNet.__new__(SegmentNet)
    nn.Module.__init__(net)
    net.net, net.config = Sides(), dict(n_classes=3, arch='sides', backbone='none')
    net.forward = net.net.forward
    return Segmenter(net, ['background', 'left', 'right'], 24, sides=sides)


PHOTO = np.zeros((24, 24, 3), np.uint8)


def test_a_mirrored_prediction_swaps_sides():
    "Asked for a mirror image too, the answer is that for the photo; without the swap it is a draw between the sides."
    want = sided(None).predict(PHOTO, flip=False)
    assert set(want[:, :8].ravel()) == {1} and set(want[:, 16:].ravel()) == {2}
    np.testing.assert_array_equal(sided([0, 2, 1]).predict(PHOTO), want)
    p = sided(None).probabilities(PHOTO)
    np.testing.assert_allclose(p[1], p[2], atol=1e-6)


def test_an_embedder_swaps_sides():
    class Net(Sides):
        def embed(self, x): return super().forward(x)
        def classify(self, e): return e
    images = [PHOTO, PHOTO]
    _, _, p = Embedder(Net(), ['background', 'left', 'right'], 24, sides=[0, 2, 1])(images)
    assert p.argmax(1)[0, 0, :8].eq(1).all() and p.argmax(1)[0, 0, 16:].eq(2).all()
    _, _, q = Embedder(Net(), ['background', 'left', 'right'], 24)(images)
    assert torch.allclose(q[:, 1], q[:, 2])


@pytest.mark.parametrize('sides', ([0, 2], [0, 2, 2], [1, 2, 0]))
def test_sides_change_places_in_pairs(sides):
    with pytest.raises(ValueError, match='in pairs'): check_swap(sides, 3)
    assert swap_classes(torch.eye(3)[None], [0, 2, 1])[0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The table, by the command line."
    folder = tmp_path_factory.mktemp('runs')
    assert main(['table', 'spml-densepose', '--profile', 'smoke', '--seed', '0', '--workers', '1', '-o', str(folder)]) == 0
    return folder


@pytest.fixture
def study(runs):
    s = parts.parts_settings('smoke', seeds=(0,))
    return LabelsStudy(parts.parts_data(None, runs, s, 1), runs, s, quiet, 1)


def test_rows_of_the_table(runs):
    rows = Table.load(runs/'spml-densepose-smoke.json').rows.set_index('labels')
    assert list(rows.index) == ['nothing: all background', *parts.ROWS]
    assert rows.loc['points, no feature affinity', 'published'].value == .4415 and rows.published.count() == 1
    assert rows.loc['true part masks', 'pseudo masks'] is None and rows.loc['points', 'pseudo masks'].value > rows.loc['nothing: all background', 'pseudo masks'].value
    assert (runs/'spml-densepose-smoke.jpg').stat().st_size > 1000


def test_finished_runs_are_used_again(runs, capsys):
    assert main(['table', 'spml-densepose', '--profile', 'smoke', '--seed', '0', '--workers', '1', '-o', str(runs)]) == 0
    said = capsys.readouterr().out
    assert 'running' not in said and 'spml: reused' in said and 'nearest: reused' in said


def test_models_know_their_sides(study):
    "Embedding and classifier are saved with the table, and asked with it."
    t = parts.teach_parts(study, 'points', 0)
    model = load_segmenter(parts.names_stage(study, t, study.seeded(0))/'model')
    assert load_spml(t.embedding.folder)[1]['sides'] == load_embedder(t.embedding.folder).sides == model.sides == SWAP


@pytest.mark.parametrize('learner', (short_frozen, frozen_learner))
def test_classifiers_learn_mirror_images_with_swapped_sides(study, learner):
    t = parts.teach_parts(study, 'points', 0)
    learn = learner(study.train, t.read, t.embedding.folder, size=64, bs=4)
    found = [x.sides for x in learn.dls.train.after_item.fs if isinstance(x, Augment)]
    assert len(found) == 1 and np.array_equal(found[0][0], MIRRORED)


def test_a_model_with_wrong_sides_is_named(study, tmp_path):
    t = parts.teach_parts(study, 'points', 0)
    load_segmenter(parts.names_stage(study, t, study.seeded(0))/'model').save(tmp_path)
    about = json.loads((tmp_path/'model.json').read_text())
    about['sides'] = [*range(14), 99]; (tmp_path/'model.json').write_text(json.dumps(about))
    with pytest.raises(InputError, match="'sides' cannot be"): load_segmenter(tmp_path)


def test_mirrored_label_maps_swap_sides_and_keep_254_and_255(study):
    "What the embedding learns from: numbers of a mirror image are those of the other side, regions stay."
    view, label = study.train, np.full((96, 96), UNLABELLED, np.uint8)
    label[:, :20], label[:, 80:], label[40] = 2, 14, VOID
    sized = view.keep(lambda o: True)
    def read(o): h, w = study.dataset.read_truth(study.dataset[o.id]).shape; return label[:h, :w]
    def region(o): return read(o).astype(int)
    seen = set()
    for flip in (0., 1.):
        aug = parts_augment(flip)
        learn = spml_learner(sized, read, region, 'densepose', augment=aug, size=64, bs=4, pretrained=False, sides=MIRRORED)
        maps = learn.dls.train.one_batch()[1].as_subclass(torch.Tensor)
        seen.add((flip, tuple(maps[:, 0].unique().tolist()), tuple(maps[:, 1].unique().tolist())))
    found = {f: (a, b) for f, a, b in seen}
    assert set(found[0.][0]) <= {2, 14, 254, 255} and 2 in found[0.][0]
    assert set(found[1.][0]) <= {3, 14, 254, 255} and 3 in found[1.][0] and {254, 255} <= set(found[1.][0])
    assert 2 in found[1.][1] and 3 not in found[1.][1]


def parts_augment(flip):
    return Augment((1., 1.), flip=flip, brightness=0., contrast=0., sides={0: MIRRORED})


def test_sides_do_not_go_with_tags(study):
    with pytest.raises(ValueError, match='occ=0'): spml_learner(study.train, None, None, 'points', sides=MIRRORED, pretrained=False)


def test_feature_affinity_is_the_only_difference_of_the_rows(study):
    a, b = (parts.teach_parts(study, r, 0).embedding.config for r in ('points', 'points, no feature affinity'))
    assert {k for k in a if a[k] != b[k]} == {'preset'} and {k for k in a['preset'] if a['preset'][k] != b['preset'][k]} == {'aff'}
    assert a['preset']['aff'] == .5 and a['preset']['occ'] == 0 and a['sides'] == MIRRORED.tolist()


def test_joined_sides_forgive_a_wrong_side_only():
    m = np.zeros((2, 15, 15), int); m[:, 2, 3] = 5; m[:, 2, 13] = 1; m[:, 1, 1] = 4
    j = parts.joined_sides(m)
    assert j.shape == (2, 9, 9) and (j.sum((1, 2)) == 10).all() and (np.trace(j, axis1=1, axis2=2) == 9).all()


@pytest.mark.parametrize('arguments, says', [
    (['--data', 'voc=x'], 'NAME is one of densepose'),
    (['--data', 'densepose=/nowhere', '--profile', 'smoke'], 'no such folder'),
    (['--profile', 'paper'], '--data densepose=FOLDER'),
])
def test_bad_arguments(arguments, says, capsys, tmp_path):
    assert main(['table', 'spml-densepose', *arguments, '-o', str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


def test_unknown_row(study):
    with pytest.raises(InputError, match='is no row'): parts.teach_parts(study, 'clicks', 0)


def test_labels_beyond_the_border_are_void_where_classes_have_sides():
    "There the photo goes on as its mirror image, in which a left hand is a right one."
    from fastai.torch_core import TensorImage, TensorMask
    image, label = TensorImage(torch.zeros(3, 20, 20, dtype=torch.uint8)), TensorMask(torch.full((20, 20), 2, dtype=torch.uint8))
    for flip, number in ((0., 2), (1., 3)):
        _, m = Augment((2., 2.), flip, 0., 0., sides={0: MIRRORED})((image, label), split_idx=0)
        assert set(m.unique().tolist()) == {number, VOID} and 80 <= (m == number).sum() <= 121
        _, m = Augment((2., 2.), flip, 0., 0.)((image, label), split_idx=0)
        assert m.unique().tolist() == [2]
