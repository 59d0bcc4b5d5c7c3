"The tables of the pets study: whole commands, no leak, resumed runs, and the rows against outside references."
import json
import shutil

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_jaccard_index

from wsss_nb.data.items import InputError
from wsss_nb.data.sample import sample
from wsss_nb.data.store import LabelStore
from wsss_nb.localize.ccam import FeatureCache, ccam_learner, create_ccam
from wsss_nb.study import pets as study
from wsss_nb.study.cli import main
from wsss_nb.study.tables import Table


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for part in ('pets', 'background'): shutil.copytree(sample(profile='smoke')/part, root/part)
    return root


@pytest.fixture(scope='module')
def first(photos, tmp_path_factory):
    "Table 1 of the smallest sample, by the command line."
    runs = tmp_path_factory.mktemp('runs')
    assert main(['table', 'pets-1', '--profile', 'smoke', '--data', f'pets={photos}/pets', '-o', str(runs)]) == 0
    return runs


def test_table_1(first):
    t = Table.load(first/'pets-1-smoke.json')
    rows = t.rows.set_index(['method', 'start weights'])
    assert list(rows.index[:2]) == [('all foreground', 'none'), ('centre ellipse', 'none')]
    assert list(rows.index[2:]) == [(m, s) for m in ('CAM', 'CAM+ECS', 'CCAM', 'CCAM+ECS') for s in ('ImageNet', 'species', 'breeds') if (m, s) != ('CCAM+ECS', 'ImageNet')]
    assert rows.loc[('CAM', 'ImageNet'), 'published IoU'].value == pytest.approx(.2603) and 'half the Dice' in rows.loc[('CAM', 'ImageNet'), 'published IoU'].source
    assert (rows['oracle IoU'].dropna().astype(float) >= 0).all() and not list(first.glob('features-*'))


def test_a_finished_table_is_read_from_its_runs(first, photos, capsys):
    before = (first/'pets-1-smoke.json').read_text()
    assert main(['table', 'pets-1', '--profile', 'smoke', '--data', f'pets={photos}/pets', '-o', str(first)]) == 0
    said = capsys.readouterr().out
    assert 'running' not in said and (first/'pets-1-smoke.json').read_text() == before


def test_no_training_mask_and_no_test_tag_is_needed(first, photos, tmp_path):
    "Trimaps of trainval deleted, breeds of the test photos exchanged among the known ones: the rows of table 1 are the same."
    shutil.copytree(photos, tmp_path/'photos')
    notes = tmp_path/'photos'/'pets'/'annotations'
    train = [l.split()[0] for l in (notes/'trainval.txt').read_text().splitlines() if not l.startswith('#')]
    for i in train: (notes/'trimaps'/f'{i}.png').unlink()
    data = study.pets_data(tmp_path/'photos'/'pets')
    s = study.pets_settings('smoke')
    job = study.PetsStudy(data, tmp_path/'runs', s, say=lambda text: None)
    job.test._items = [type(o)(o.id, o.image, (1,)) for o in job.test]     # everything is the first breed now
    rows = study._start_rows(job, 'ImageNet')
    told = Table.load(first/'pets-1-smoke.json').rows.set_index(['method', 'start weights'])
    for m, r in rows.items(): assert r.result.row()['IoU'].value == pytest.approx(told.loc[(m, 'ImageNet'), 'IoU'].value, abs=1e-12)


def test_rows_are_torchmetrics(first, photos):
    "IoU of a row, and the formula of the CCAM family, photo by photo."
    s = study.pets_settings('smoke')
    job = study.PetsStudy(study.pets_data(photos/'pets'), first, s, say=lambda text: None)
    row = study._start_rows(job, 'ImageNet')['CCAM']
    ours, border = [], []
    for i in row.result.ids:
        mask, truth = torch.from_numpy(row.masks.load(i)).long(), torch.from_numpy(job.dataset.read_truth(job.dataset[i])).long()
        ours.append(binary_jaccard_index(mask, truth, ignore_index=255).item())
        border.append(binary_jaccard_index(mask, (truth > 0).long()).item())
    assert row.result.row()['IoU'].value == pytest.approx(np.mean(ours), abs=1e-6)
    assert study.source_metric(row, job.dataset)[0] == pytest.approx(np.mean(border), abs=1e-6)


def test_the_rule_marks_the_same_part_for_every_method(first, photos):
    s = study.pets_settings('smoke')
    job = study.PetsStudy(study.pets_data(photos/'pets'), first, s, say=lambda text: None)
    for erase in (False, True):
        maps = study.cam_maps(first, job.train, s, study.Start('ImageNet'), job.say, erase)
        t = study.rule_threshold(maps, job.train, s)
        values = [study.MapStore(maps/'maps').load(i).values[0] for i in job.train.ids]
        assert abs(np.mean([(v > t).mean() for v in values]) - s.area) < .02


def test_networks_have_the_same_number_of_steps():
    "On real pets there are 3,680 photos with pseudo masks and 674 with true ones; on the sample as many of both."
    s = study.PETS_PROFILES['full']
    steps = [n // s.segment_bs * e for n, e in ((3680, s.segment_epochs), (674, s.truth_epochs))]
    assert abs(steps[0] - steps[1]) < .02 * steps[0]
    for profile in ('smoke', 'sample'): assert study.PETS_PROFILES[profile].truth_epochs == study.PETS_PROFILES[profile].segment_epochs


def test_seeds_row():
    class Result:
        def __init__(self, x): self.frame = type('F', (), {'iou': np.array(x)})
        def row(self, policy='ignored'): return {k: type('I', (), {'value': self.frame.iou.mean()}) for k in ('IoU', 'Dice', 'data-set IoU')}
    rows = [study.Scored('U-Net', '', Result(x)) for x in ([.2, .4], [.4, .8])]
    found = study.seeds_row(rows)
    assert found['IoU'].value == pytest.approx(.45) and found['spread'] == pytest.approx(.3) and found['seeds'] == 2


def test_targets_pull_the_map():
    "CCAM+ECS: with a heavy target the map goes there; with mirror images the targets would be wrong, which is refused."
    torch.manual_seed(0)
    net = create_ccam(pretrained=False)
    f = torch.rand(8, 1, net.head.conv.in_channels, 4, 4)
    view = [type('O', (), {'id': str(k)}) for k in range(8)]
    target = torch.zeros(8, 1, 4, 4); target[..., :2] = 1
    f[..., :2] += target[:, :, None, :, :2] * 2
    learn = ccam_learner(view, backbone=net.backbone, cache=FeatureCache(f, [o.id for o in view]), bs=8, targets=target)
    learn.loss_func.weight = 100.
    with learn.no_bar(), learn.no_logging(): learn.fit(60, 1e-2)
    p = learn.model.head(f[:, 0])[2]
    assert p[..., :2].mean() > p[..., 2:].mean() + .3
    with pytest.raises(ValueError, match='mirror=False'):
        ccam_learner(view, backbone=net.backbone, cache=FeatureCache(f.repeat(1, 2, 1, 1, 1), [o.id for o in view]), bs=8, targets=target)


@pytest.mark.parametrize('arguments, says', [(['pets-4'], 'invalid choice'), (['pets-1', '--data', 'dogs=x'], 'one of pets, background'), (['pets-1', '--data', 'pets'], '--data NAME=PATH'),
                                             (['pets-1', '--data', 'pets=/nowhere/at/all'], 'no such folder')])
def test_bad_arguments(arguments, says, capsys, tmp_path):
    try: code = main(['table', *arguments, '-o', str(tmp_path)])
    except SystemExit as e: code = e.code
    assert code in (1, 2) and says in capsys.readouterr().err


def test_no_test_mask_is_said(photos, tmp_path):
    shutil.copytree(photos/'pets', tmp_path/'pets')
    for f in (tmp_path/'pets'/'annotations'/'trimaps').iterdir(): f.unlink()
    with pytest.raises(InputError, match='no test photo has a mask'): study.PetsStudy(study.pets_data(tmp_path/'pets'), tmp_path/'runs', study.pets_settings('smoke'))


def test_tables_2_and_3(first, photos, capsys):
    "All rows are there; the U-Nets have both seeds; what table 1 computed is used."
    for which in ('pets-2', 'pets-3'):
        assert main(['table', which, '--profile', 'smoke', '--data', f'pets={photos}/pets', '--data', f'background={photos}/background', '--seeds', '0', '-o', str(first)]) == 0
    assert 'ccam: reused' in capsys.readouterr().out
    two, three = (Table.load(first/f'{n}-smoke.json').rows for n in ('pets-2', 'pets-3'))
    assert two['start weights'].tolist()[2:] == ['species + background', 'breeds + background'] * 4
    assert three['method'].tolist().count('U-Net') == 4 and three['seeds'].dropna().tolist() == [1] * 4
    assert [m for m in three['method'] if m.startswith('ensemble')] == [f'ensemble: {w}' for w in ('mean', 'product', 'max', 'agreement')]
    for run in first.glob('*-*/record.json'): assert json.loads(run.read_text())['config_hash'] in run.parent.name
    assert len(LabelStore(next(first.glob('predict-*'))/'masks')) == 6
