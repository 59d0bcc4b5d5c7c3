"The study of labels, whole commands, and models from your own drawings; on the smallest profile."
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from wsss_nb.data.items import UNLABELLED, VOID, InputError, read_image, read_mask
from wsss_nb.refine.contours import contour_regions
from wsss_nb.study import spml
from wsss_nb.study.cli import main
from wsss_nb.study.scenes import scenes_data
from wsss_nb.study.tables import Table


def quiet(text): pass


@pytest.fixture(scope='module')
def runs(photos, tmp_path_factory):
    "The table, by the command line."
    folder = tmp_path_factory.mktemp('runs')
    assert main(['table', 'spml-voc', '--profile', 'smoke', '--seed', '0', '--workers', '1', '--data', f'voc={photos}', '-o', str(folder)]) == 0
    return folder


@pytest.fixture
def study(photos, runs): return spml.LabelsStudy(scenes_data(photos), runs, spml.spml_settings('smoke', seeds=(0,)), quiet, 1)


def test_rows_of_the_table(runs, photos):
    rows = Table.load(runs/'spml-voc-smoke.json').rows.set_index('labels')
    assert list(rows.index) == list(spml.KINDS)
    assert rows.loc['tags', 'published val'].value == .695 and rows.loc['scribbles', 'published test'].value == .764
    assert rows.loc['scribbles', 'labelled'] < rows.loc['boxes', 'labelled'] and rows.loc['masks', 'right'] == 1 and rows.loc['masks', 'pseudo masks'] is None
    assert (runs/'spml-voc-smoke.jpg').stat().st_size > 1000


def test_finished_runs_are_used_again(runs, photos, capsys):
    assert main(['table', 'spml-voc', '--profile', 'smoke', '--seed', '0', '--workers', '1', '--data', f'voc={photos}', '-o', str(runs)]) == 0
    said = capsys.readouterr().out
    assert 'running' not in said and 'spml: reused' in said and 'neighbours: reused' in said


def test_tags_go_round_twice(study):
    "The second round starts from the classifier of the first; one round is its beginning."
    s = study.seeded(0)
    two = spml.teach(study, 'tags', 0)
    study.s = spml.replace(study.s, tag_rounds=1)
    one = spml.teach(study, 'tags', 0)
    assert one.embedding.hash == two.embedding.hash and one.masks.hash != two.masks.hash
    assert one.masks.config['names'] is None and two.masks.config['names'] == spml.names_stage(study, one, s).hash


def test_labels_from_tags_by_area(study):
    "A quarter of the pixels beats the background, and as many are called objects as the sure share says; published constants stay as they are."
    s = study.seeded(0)
    maps = spml.cam_maps(study, s)
    scores = spml.tag_scores(maps, study.train, s)
    strongest = np.concatenate([spml.MapStore(maps/'maps').load(i).values.max(0, initial=0).ravel() for i in study.train.ids])
    assert np.mean(strongest > (1 - strongest) ** scores['alpha']) == pytest.approx(s.area, abs=.01)
    assert np.mean(strongest >= scores['least']) == pytest.approx(s.area * s.sure[0], abs=.01)
    labels = spml.tag_weak(study, s)
    found = np.concatenate([np.asarray(labels.read(o)).ravel() for o in labels.view])
    assert 0 < np.mean((found > 0) & (found < UNLABELLED)) < s.area and np.mean(found == UNLABELLED) > 0
    assert spml.tag_scores(None, None, spml.spml_settings('paper')) == {'alpha': 6., 'least': .2}


def test_no_mask_is_read_before_the_scores(photos, tmp_path):
    "Training on labels of all kinds works when the masks of the training photos are gone, and gives the same."
    bare = shutil.copytree(photos, tmp_path/'VOC2012')
    data = scenes_data(photos)
    for i in data.split('train'): (bare/f'SegmentationClass/{i}.png').unlink(missing_ok=True)
    for i in data.split('train'): (bare/f'SegmentationObject/{i}.png').unlink(missing_ok=True)
    s = spml.spml_settings('smoke', seeds=(0,), steps=1)
    with_masks, without = (spml.LabelsStudy(scenes_data(d), tmp_path/name, s, quiet, 1) for d, name in ((photos, 'a'), (bare, 'b')))
    for kind in ('tags', 'points'):
        a, b = (spml.teach(st, kind, 0) for st in (with_masks, without))
        for o in a.weak.view: assert (a.read(o) == b.read(o)).all(), (kind, o.id)
    with pytest.raises((InputError, ValueError)): spml.teach(without, 'masks', 0)


def test_simulated_drawings(photos, tmp_path):
    "They are drawn on masks, and are called simulated in the table."
    s = spml.spml_settings('smoke', seeds=(0,), steps=1, strokes='simulated')
    study = spml.LabelsStudy(scenes_data(photos), tmp_path, s, quiet, 1)
    weak, files = spml.stroke_weak(study, s, 'points'), spml.stroke_weak(study, spml.replace(s, strokes='files'), 'points')
    assert weak.simulated and not files.simulated and weak.hash != files.hash
    for o in weak.view:
        m, truth = weak.read(o), study.dataset.read_truth(study.dataset[o.id])
        assert set(np.unique(m)) - {UNLABELLED, VOID} <= set(np.unique(truth))
    table, _ = spml.spml_voc(study, ('points',))
    assert '(points simulated)' in str(table)


def test_unusable_drawings_are_named(photos, tmp_path):
    "A scribble of an unknown class leaves its photo out, aloud, and when the stage is asked again, too."
    bare = shutil.copytree(photos, tmp_path/'VOC2012')
    data = scenes_data(bare)
    one, *rest = [o for o in data.view('scribbles', 'train') if o.scribbles is not None]
    wrong = read_mask(one.scribbles); wrong[wrong < UNLABELLED] = 77
    Image.fromarray(wrong).save(one.scribbles)
    said = []
    s = spml.spml_settings('smoke', seeds=(0,))
    study = spml.LabelsStudy(data, tmp_path/'runs', s, said.append, 1)
    for _ in range(2):
        said.clear()
        weak = spml.stroke_weak(study, s, 'scribbles')
        named, = [t for t in said if 'left out' in t]
        assert named.startswith('1 photos') and one.id in named and '77' in named and one.id not in weak.view.ids
    assert {o.id for o in rest} & set(study.train.ids) == set(weak.view.ids)


def test_regions_from_files(photos, tmp_path, capsys):
    "Region maps of a contour detector take the place of those made here; a missing one is named."
    s = spml.spml_settings('smoke', seeds=(0,))
    made = spml.LabelsStudy(scenes_data(photos), tmp_path/'a', s, quiet, 1)
    store, ids = spml.RegionStore(made.regions/'regions'), made.train.ids
    files = tmp_path/'files'; files.mkdir()
    for i in ids: Image.fromarray((store.load(i) // 2).astype(np.uint8)).save(files/f'{i}.png')
    study = spml.LabelsStudy(scenes_data(photos), tmp_path/'b', s, quiet, 1, files)
    assert study.regions.hash != made.regions.hash
    for i in ids: assert (spml.RegionStore(study.regions/'regions').load(i) == store.load(i) // 2).all()
    Image.fromarray(store.load(ids[0]).astype(np.uint8)).save(files/f'{ids[0]}.png')
    other = spml.LabelsStudy(scenes_data(photos), tmp_path/'b', s, quiet, 1, files)
    assert other.regions.hash != study.regions.hash, 'the files are part of the name'
    (files/f'{ids[0]}.png').unlink()
    assert main(['table', 'spml-voc', '--profile', 'smoke', '--seed', '0', '--workers', '1', '--data', f'voc={photos}', '--data', f'regions={files}', '-o', str(tmp_path/'c')]) == 1
    assert f'{ids[0]}.png: no such region map' in capsys.readouterr().err


def test_regions_are_cut_as_finely_as_the_network_sees(photos, tmp_path):
    "Photos longer than one and a half sides of the training square are reduced for the cut, and the regions enlarged again."
    s = spml.spml_settings('smoke', seeds=(0,), segment_size=32)
    few, many = (spml.LabelsStudy(scenes_data(photos), tmp_path/str(side), spml.replace(s, contour_side=side), quiet, 1) for side in (1.5, None))
    for o in few.train:
        a, b = (spml.RegionStore(st.regions/'regions').load(o.id) for st in (few, many))
        assert a.shape == b.shape and (a == contour_regions(read_image(o.image), longest=48)).all() and (b == contour_regions(read_image(o.image))).all()
    assert spml.spml_settings('paper').contour_side is None


@pytest.mark.parametrize('arguments, says', [
    (['table', 'spml-voc', '--data', 'pets=x'], 'NAME is one of voc, regions'),
    (['table', 'spml-voc', '--data', 'regions=/nowhere'], 'no such folder'),
    (['table', 'spml-voc', '--data', 'voc=/nowhere'], 'no such folder'),
    (['table', 'spml-voc', '--profile', 'paper'], '--data voc=FOLDER'),
    (['segment', '.', '--scribbles', 'a', '--boxes', 'b'], 'does not go with --boxes'),
])
def test_bad_arguments(arguments, says, capsys, tmp_path):
    assert main([*arguments, '-o', str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


def test_unknown_kind(study):
    with pytest.raises(InputError, match='is no kind of label'): spml.teach(study, 'lines', 0)


def test_paper_settings():
    "Each kind has the weights of its script."
    p = spml.spml_settings('paper')
    assert spml.preset_of('points', p).ann == .1 and spml.preset_of('scribbles', p).occ_kappa == 12 and spml.preset_of('masks', p) == spml.preset_of('scribbles', p)
    assert spml.preset_of('tags', p).backbone == p.backbone == 'resnet101s' and spml.preset_of('tags', p).iterations == 30_000
    s = spml.spml_settings('sample')
    assert spml.preset_of('tags', s).backbone == s.backbone and spml.preset_of('tags', s).iterations == s.steps


# Your own drawings

def own(tmp_path, photos, kind, n=10):
    data = scenes_data(photos)
    view = data.view(kind, 'train').keep(lambda o: getattr(o, kind) is not None)
    (tmp_path/'photos').mkdir(); (tmp_path/'drawn').mkdir()
    some = list(view)[:n]
    for o in some:
        shutil.copy(o.image, tmp_path/'photos')
        m = read_mask(getattr(o, kind))
        Image.fromarray(np.where(m == UNLABELLED, VOID, m).astype(np.uint8)).save(tmp_path/f'drawn/{o.id}.png')      # 255 elsewhere, as the help says
    return [o.id for o in some], data.classes


def test_a_model_from_your_own_clicks(photos, tmp_path, capsys):
    kind = 'points'
    ids, classes = own(tmp_path, photos, kind)
    argv = ['segment', str(tmp_path/'photos'), f'--{kind}', str(tmp_path/'drawn'), '--classes', ','.join(classes), '-o', str(tmp_path/'model'), '--size', '64', '--epochs', '1', '--workers', '1']
    assert main(argv) == 0
    about = json.loads((tmp_path/'model/model.json').read_text())
    assert about['net']['arch'] == 'spml' and about['classes'] == ['background', *classes] and (tmp_path/'model/pseudo_masks.jpg').stat().st_size > 1000
    assert main(['predict', str(tmp_path/'model'), str(tmp_path/'photos'), '-o', str(tmp_path/'out')]) == 0
    assert read_mask(tmp_path/f'out/{ids[0]}.png').shape == read_image(tmp_path/f'photos/{ids[0]}.jpg').shape[:2]
    capsys.readouterr()
    assert main(argv) == 0 and 'running' not in capsys.readouterr().out


def test_bad_drawings_are_left_out_and_named(photos, tmp_path, capsys):
    "A class that is not there, a drawing of another size, one without a stroke: the others are used."
    ids, classes = own(tmp_path, photos, 'scribbles')
    files = [tmp_path/f'drawn/{i}.png' for i in ids]
    shape = read_mask(files[0]).shape
    unknown = np.full(shape, VOID, np.uint8); unknown[3, 3] = 99
    for f, m in zip(files, (unknown, np.zeros((5, 5), np.uint8), np.full(read_mask(files[2]).shape, VOID, np.uint8))): Image.fromarray(m).save(f)
    code = main(['segment', str(tmp_path/'photos'), '--scribbles', str(tmp_path/'drawn'), '--classes', ','.join(classes), '-o', str(tmp_path/'model'), '--size', '64', '--epochs', '1', '--workers', '1'])
    said = capsys.readouterr()
    assert code == 1 and f'{len(ids) - 2} photos with scribbles' in said.out
    for i in ids[:2]: assert f'{i}.png' in said.err
    assert '1 photos without usable scribbles are left out' in said.out and f'{ids[2]}.jpg: its scribbles label no pixel' in said.out     # nothing wrong with the file
    assert (tmp_path/'model/model.json').is_file()
