"""Cards are found by any usual name, and offer less memory than their name says."""

import re

import pytest

from toolkit.errors import UserError
from toolkit.memory.cuda.cards import _PROFILES, CARDS, card_of_device, find_card, generic_card, split_count
from toolkit.memory.cuda.device import Cuda
from toolkit.units import GIB, MIB


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("T4", "T4"),
        ("Tesla T4", "T4"),
        ("4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx 3080ti", "RTX 3080 Ti"),
        ("NVIDIA RTX 6000 Ada", "RTX 6000 Ada"),
        ("4060 Ti 16GiB", "RTX 4060 Ti 16GB"),
        ("A100-80GB", "A100 80GB"),
        ("A100", "A100 40GB"),
        ("H100", "H100 80GB"),
        ("h200", "H200"),
        # as drivers name them
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200 NVL", "H200"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),  # 480 GB is the memory of its CPU
        ("NVIDIA GH200 144G HBM3e", "GH200 144GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX 4000 SFF Ada Generation", "RTX 4000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", "RTX 3070 Laptop"),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "RTX 2070"),
        ("NVIDIA GeForce GTX 1060 6GB", "GTX 1060"),
        # as users write them
        ("RTX 3060 12 GB", "RTX 3060"),
        ("3060 12G", "RTX 3060"),
        ("RTX 3060 8GB", "RTX 3060 8GB"),
        ("RTX 3080 10GB", "RTX 3080"),
        ("3090 24GB", "RTX 3090"),
        ("RTX 3090 24 GB GDDR6X", "RTX 3090"),
        ("RTX 4090D", "RTX 4090 D"),
        ("RTX 4090 laptop", "RTX 4090 Laptop"),
        ("T4 15GB", "T4"),  # nvidia-smi shows 15 of its 16 GB
        ("V100", "V100 16GB"),
        ("V100-32GB", "V100 32GB"),
        ("H100 SXM5 80GB", "H100 80GB"),
        ("P40", "P40"),
        ("GTX 1650", "GTX 1650"),
        ("GH200", "GH200 96GB"),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell"),
        ("RTX PRO 5000 72GB", "RTX PRO 5000 72GB"),
        ("Tesla P100-PCIE-12GB", "P100 12GB"),
        ("GTX 1060 3GB", "GTX 1060 3GB"),
        ("NVIDIA TITAN X (Pascal)", "TITAN X"),
        ("Quadro P6000", "Quadro P6000"),
        ("Tesla V100S-PCIE-32GB", "V100S"),
        ("Tesla V100-DGXS-32GB", "V100 32GB"),
        ("NVIDIA GeForce GTX 1650 Ti", "GTX 1650 Ti Laptop"),  # only sold in laptops
        ("GTX 1660 Ti mobile", "GTX 1660 Ti Laptop"),
        ("RTX 2080 Super Laptop", "RTX 2080 SUPER Laptop"),
        ("NVIDIA RTX A5000 Laptop GPU", "RTX A5000 Laptop"),
        ("NVIDIA RTX 3500 Ada Generation Laptop GPU", "RTX 3500 Ada Laptop"),
        ("H20 141GB", "H20 141GB"),
        ("NVIDIA GH200 120GB", "GH200 96GB"),  # 120 GB is the memory of its CPU
        ("NVIDIA GB200", "GB200"),
        ("ASUS TUF Gaming RTX 3090 OC", "RTX 3090"),
        ("MSI GeForce RTX 4090 SUPRIM X 24G", "RTX 4090"),
        ("Gigabyte RTX 3060 Eagle", "RTX 3060"),
        ("RTX 3090 FE", "RTX 3090"),
        ("Colab T4", "T4"),
        ("RTX 4090 24576MiB", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB, 81920 MiB", "A100 80GB"),
        ("RTX 3060, 8192 MiB", "RTX 3060 8GB"),
        ("A100 40", "A100 40GB"),
        ("HGX H100", "H100 80GB"),
        ("NVIDIA® GeForce RTX™ 3060", "RTX 3060"),
        ("RTX 4070 TiS", "RTX 4070 Ti SUPER"),
        ("RTX 4090M", "RTX 4090 Laptop"),
        ("RTX 6000 Pro", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 4000 Blackwell SFF Edition", "RTX PRO 4000 Blackwell"),
        ("H100-80", "H100 80GB"),
        ("RTX 4090 24 Go", "RTX 4090"),
        ("RTX 4090 24 GB VRAM", "RTX 4090"),
        ("1x RTX 4090", "RTX 4090"),
        ("T4 (Colab)", "T4"),
        ("Colab Pro A100", "A100 40GB"),
        ("PNY RTX 4070 Verto", "RTX 4070"),  # words of shops that are in no list
        ("Gigabyte AORUS RTX 4090 MASTER", "RTX 4090"),
        ("Zotac GAMING GeForce RTX 3060 Twin Edge OC", "RTX 3060"),
        ("INNO3D RTX 4080 iChill X3", "RTX 4080"),
        ("EVGA 3080 FTW3 ULTRA", "RTX 3080"),
        ("vast.ai 4090", "RTX 4090"),
        ("PNY RTX 4090 Verto 24 GB", "RTX 4090"),
        ("Volta V100 PCIe 32GB", "V100 32GB"),
        ("RTX 3090 NVLink", "RTX 3090"),
        # machines that are rented by name
        ("g5.xlarge", "A10G"),
        ("ml.g6e.2xlarge", "L40S"),
        ("p4d.24xlarge", "A100 40GB"),
        ("a2-highgpu-1g", "A100 40GB"),
        ("g2-standard-4", "L4"),
        ("Standard_NC4as_T4_v3", "T4"),
        ("Standard_NC24ads_A100_v4", "A100 80GB"),
        # slices
        ("A100 MIG 3g.40gb", "A100 80GB MIG 3g.40gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "A100 40GB MIG 1g.5gb"),
        ("H100-MIG-1g.10gb", "H100 80GB MIG 1g.10gb"),
        ("A30 2g.12gb+me", "A30 MIG 2g.12gb"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "H100 80GB MIG 3g.40gb"),
    ],
)
def test_a_card_is_found_by_its_usual_names(given, found):
    assert find_card(given).name == found


@pytest.mark.parametrize(("given", "near"), [("RTX 4099", "RTX 4090"), ("L40X", "L40S"), ("T5", "T4"), ("P5", "P4")])
def test_an_unknown_card_lists_similar_names(given, near):
    with pytest.raises(UserError, match=f"unknown GPU '{given}'.*{near}"):
        find_card(given)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name(card):
    assert find_card(card.name) is card


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("2x RTX 3090", "name one card; for 2 of them, --gpu 'RTX 3090' --launch zero3 --num_processes 2"),
        ("A100 80GB x4", "name one card; for 4 of them, --gpu 'A100 80GB'"),
        ("two 3090s", "name one card; for 2 of them, --gpu '3090s'"),
        ("4090x2", "name one card; for 2 of them, --gpu '4090'"),
        ("8 H100", "name one card; for 8 of them, --gpu 'H100'"),
        ("T4 (x2)", "name one card; for 2 of them, --gpu 'T4'"),
        ("Kaggle 2xT4", "name one card; for 2 of them, --gpu 'T4'"),
        ("RTX 4090 + RTX 3060", "of several the smallest decides, --gpu 'RTX 3060'"),
        ("A100 MIG", "is a slice of a card; .*or the card with a MIG profile"),
        ("NVIDIA L40S-48Q", "is a slice of a card; give its memory, for instance --gpu_memory 48GiB"),
        ("A100 MIG 1c.3g.40gb", "is a slice of a card.*--gpu_memory"),
        ("MIG 1g.6gb", "is a slice of a card; name the card too, such as 'A30 MIG 1g.6gb'"),
        ("A100 80GB MIG 1g.5gb", "there is no such slice; the A100 80GB has 1g.10gb, 1g.20gb, 2g.20gb, "),
        ("RTX 4090 MIG 1g.5gb", "there is no such slice; the RTX 4090 cannot be sliced"),
        ("RTX 4070 suprt", "unknown GPU.*similar names are .*RTX 4070 SUPER"),  # a misspelt word is no shop's
        ("cuda:0", "for this machine's own leave --gpu out"),
        ("24GB", "names no card; .*--gpu_memory 24GB"),
        ("B300", "unknown GPU 'B300'; similar names are .*B200"),
        ("12 GB", "its memory with --gpu_memory"),
        ("RTX 4090 48GB", "that card comes with 24 GB; for another size give --gpu_memory 48GB"),
        ("A100 60GB", "that card comes with 40 or 80 GB"),
        *(
            (name, "is not predicted: .*CUDA.*--gpu_memory")
            for name in (
                "AMD Radeon Pro 5000",
                "TPU v5e",
                "v3-8",
                "Ascend 910B",
                "Gaudi 3",
                "MI300X",
                "RX 7900 XTX",
                "7900 XTX",
                "9070 XT",
                "Radeon PRO W7900",
                "gfx1100",
            )
        ),
        *(
            (name, "is not predicted: .*CUDA.*--gpu_memory")
            for name in ("Arc A770", "B580", "M3 Max", "Apple M1 Ultra")
        ),
        *(
            (name, "shares its memory with the processor.*--gpu_memory")
            for name in ("Jetson Orin", "DGX Spark", "NVIDIA GB10")
        ),
        *(
            (name, "is not predicted: .*CUDA.*--gpu_memory")
            for name in ("W7900", "MacBook Pro", "Mac Studio", "iGPU", "trainium2", "inferentia")
        ),
        ("0x RTX 3090", "names no card"),
        ("zzz", "give a name such as 'RTX 4090'"),
    ],
)
def test_a_name_that_is_not_a_single_cuda_card_gets_one_line_of_advice(given, message):
    with pytest.raises(UserError, match=message) as caught:
        find_card(given)
    assert len(str(caught.value)) < 250


def test_names_are_unique_and_all_architectures_are_covered():
    assert len({card.name for card in CARDS}) == len(CARDS)
    named = {"Pascal", "Volta", "Turing", "Ampere", "Ada", "Hopper", "Blackwell"}
    assert {card.architecture for card in CARDS} == named


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_no_card_offers_its_nominal_size(card):
    nominal = {"A100 40GB": 40, "A100 80GB": 80, "T4": 16, "RTX 4090": 24, "RTX 5090": 32, "H200": 141}.get(card.name)
    assert card.context_bytes < 0.11 * card.total_bytes
    assert card.budget_bytes == card.total_bytes
    if nominal:
        assert 0.91 * nominal * GIB < card.total_bytes < nominal * GIB


def test_measured_contexts_are_distinguished_from_estimates():
    measured = {card.name: card.context_bytes / MIB for card in CARDS if not card.context_is_estimate}
    assert measured == {"T4": 140.875, "RTX 6000 Ada": 426, "H200": pytest.approx(766.8, abs=0.1)}


def test_an_estimated_context_grows_with_the_number_of_resident_threads():
    contexts = {name: find_card(name).context_bytes / MIB for name in ("RTX 3090", "A100 80GB", "H100")}
    assert contexts == {"RTX 3090": 82 * 3.5, "A100 80GB": 504, "H100": pytest.approx(766.8, abs=0.1)}
    assert card_of_device("Some New Card", (9, 0), 132, 80 * GIB).context_bytes == find_card("H100").context_bytes


def test_totals_without_a_report_are_labelled_as_estimates():
    reported = {card.name for card in CARDS if not card.total_is_estimate}
    assert reported == {"T4", "RTX 4070 Ti", "RTX 4090", "L40", "L40S", "RTX 5090", "H200"}


def test_measured_contexts_do_not_exceed_the_estimate():
    for card in CARDS:
        if not card.context_is_estimate and card.capability != (9, 0):
            assert card.context_bytes <= 3.53 * MIB * card.multiprocessors


def test_workspace_sizes_depend_on_the_architecture():
    assert find_card("T4").blas_workspace_bytes == find_card("4090").blas_workspace_bytes == 8_519_680
    assert find_card("H200").blas_workspace_bytes == find_card("5090").blas_workspace_bytes == 32 * MIB


def test_bf16_is_native_from_ampere_on():
    assert not find_card("T4").has_bf16
    assert find_card("3060").has_bf16


def test_a_generic_card_has_exactly_the_memory_that_was_given():
    card = generic_card("24GiB")
    assert card.total_bytes == card.budget_bytes == 24 * GIB


def test_a_memory_that_does_not_parse_is_refused():
    with pytest.raises(UserError, match="'plenty' is not a size"):
        generic_card("plenty")


def test_the_card_of_this_machine_keeps_its_real_size_and_the_known_context():
    card = card_of_device("Tesla T4", (7, 5), 40, 15_000 * MIB)
    assert (card.total_bytes, card.context_bytes / MIB, card.context_is_estimate) == (15_000 * MIB, 140.875, False)
    other = card_of_device("Some New Card", (12, 0), 10, 8 * GIB)
    assert other.context_is_estimate


@pytest.mark.parametrize(("free", "own", "taken"), [(14_000, 900, 0), (13_000, 500, 1_359.125), (14_859.125, 0, 0)])
def test_memory_of_other_programs_reduces_the_budget(free, own, taken):
    card = card_of_device("Tesla T4", (7, 5), 40, 15_000 * MIB, int(free * MIB), own * MIB)
    assert card.taken_bytes == taken * MIB
    assert card.budget_bytes == Cuda(card).budget_bytes == (15_000 - taken) * MIB
    assert any("other programs use" in note for note in Cuda(card).notes) == bool(taken)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("12288", "12,288 GB; write the unit of another size, such as 12288MiB"),
        ("12288GB", "12,288 GB; write"),
        ("24000 G", "24,000 GB; write"),
        ("0.1", r"0\.1 GB; write"),
        ("100TiB", r"102400\.00 GiB; give a size such as 24GiB"),
    ],
)
def test_a_size_that_no_card_has_is_refused(given, says):
    with pytest.raises(UserError, match=f"^--gpu_memory {given}: no card has {says}"):
        generic_card(given)


@pytest.mark.parametrize("whole", _PROFILES)
def test_a_slice_is_a_card_with_its_share_of_memory_and_multiprocessors(whole):
    card = find_card(whole)
    sevenths = 7 if "7g." in _PROFILES[whole] else 4 if "4g." in _PROFILES[whole] else 2
    for profile in re.findall(r"\dg\.\d+gb", _PROFILES[whole]):
        part = find_card(f"{whole} MIG {profile}")
        share = min((1 / 8, 1 / 4, 1 / 2, 1), key=lambda one: abs(one * card.nominal_gib - int(profile[3:-2])))
        assert 0.87 * share * card.nominal_gib < part.total_bytes / GIB < share * card.nominal_gib, profile
        assert part.multiprocessors <= card.multiprocessors
        assert part.multiprocessors == pytest.approx(card.multiprocessors * int(profile[0]) / sevenths, rel=0.4), (
            profile
        )
        assert (
            part.capability == card.capability
            and part.total_is_estimate
            and part.context_bytes < card.context_bytes * 1.01
        )


@pytest.mark.parametrize(
    ("name", "gib", "multiprocessors"),
    [("A100 80GB MIG 3g.40gb", 39.25, 42), ("H100 MIG 1g.10gb", 9.75, 16), ("A30 MIG 2g.12gb", 11.69, 28)],
)
def test_a_slice_offers_what_the_driver_prints_for_it(name, gib, multiprocessors):
    part = find_card(name)
    assert (part.total_bytes, part.multiprocessors) == (int(gib * GIB), multiprocessors)


@pytest.mark.parametrize(
    ("given", "gib", "context_mib"),
    [
        *((name, 11.76, 294) for name in ("12", "12GB", "12 gb", "12G")),  # as an RTX 3060 reports
        ("24GB", 23.52, 294),
        ("12GiB", 12, 0),
        ("12884901888", 12, 0),  # bytes
        ("12288MiB", 12, 0),
    ],
)
def test_a_size_in_gb_is_that_of_a_card_sold_so_and_one_in_gib_is_exact(given, gib, context_mib):
    card = generic_card(given)
    assert card.budget_bytes == pytest.approx(gib * GIB, abs=1)
    assert card.context_bytes == context_mib * MIB


@pytest.mark.parametrize("given", ["0", "-12", "0GB", "many", "12 bananas"])
def test_a_size_that_means_nothing_is_refused(given):
    with pytest.raises(UserError, match="24GiB"):
        generic_card(given)


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ("2x RTX 3090", (2, "RTX 3090")),
        ("RTX 3090 x2", (2, "RTX 3090")),
        ("dual 3090", (2, "3090")),
        ("RTX 3090", (1, "RTX 3090")),
        ("7900 XTX", (1, "7900 XTX")),
    ],
)
def test_the_number_of_cards_is_split_from_the_name(given, split):
    assert split_count(given) == split
