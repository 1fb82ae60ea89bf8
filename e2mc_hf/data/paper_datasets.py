"""The datasets the papers evaluate on: where the Hub has them, how columns and splits are called, how they count."""

from dataclasses import dataclass, replace

ACCURACY, MEAN_PER_CLASS, MEAN_PRECISION = "accuracy", "mean per class", "mAP"
SIMCLR_LISTS = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets"
HUB_PAGE, PUBLIC_CODE, NOWHERE = "Hub page", "public code", "none found"


@dataclass(frozen=True)
class PaperDataset:
    """One dataset of the papers.

    Attributes:
        name: Name for `dataset`.
        title: What it is called in papers.
        hub_id: Where the Hub has it; None if no copy there can be trusted.
        num_classes: Number of classes.
        metric: How the papers count: accuracy, mean per class (of the accuracies), or mAP.
        image_column: Column of the images; None leaves it to the feature type.
        label_column: Column of the labels; None if it holds none that an index could be.
        train_split: Split to train or fit on.
        test_split: Split to test on.
        config: Configuration on the Hub.
        revision: Commit on the Hub, where the main branch does not load.
        gated: Whether the Hub asks for an account that has accepted its terms.
        list_url: Where to get the list of file names that picks its training images; never fetched.
        evidence: Where id, columns and splits were read; nothing here was run against the Hub.
        note: What else to know.
    """

    name: str
    title: str
    hub_id: str | None
    num_classes: int
    metric: str = ACCURACY
    image_column: str | None = "image"
    label_column: str | None = "label"
    train_split: str = "train"
    test_split: str = "test"
    config: str | None = None
    revision: str | None = None
    gated: bool = False
    list_url: str | None = None
    evidence: str = HUB_PAGE
    note: str = ""

    @property
    def confirmed(self) -> bool:
        """Whether id, columns and splits were found in public text."""
        return self.evidence != NOWHERE


_IMAGENET = PaperDataset(
    "imagenet-1k",
    "ImageNet-1k (ILSVRC 2012)",
    "ILSVRC/imagenet-1k",
    1000,
    test_split="validation",
    gated=True,
    evidence=PUBLIC_CODE,
    note="1,281,167 / 50,000 images. The labels of its own test split are not public.",
)

CATALOG = (
    _IMAGENET,
    replace(
        _IMAGENET,
        name="imagenet-1k-1-percent",
        title="ImageNet-1k, 1% of the labels",
        list_url=f"{SIMCLR_LISTS}/1percent.txt",
        note="SimCLR's list of 12,811 training images; pass it as --file_list.",
    ),
    replace(
        _IMAGENET,
        name="imagenet-1k-10-percent",
        title="ImageNet-1k, 10% of the labels",
        list_url=f"{SIMCLR_LISTS}/10percent.txt",
        note="SimCLR's list of 128,116 training images; pass it as --file_list.",
    ),
    PaperDataset(
        "inat18",
        "iNaturalist 2018",
        None,
        8142,
        test_split="validation",
        evidence=NOWHERE,
        note="No copy on the Hub with the challenge's own splits was found. Get it from"
        " https://github.com/visipedia/inat_comp and make a folder a class below train/ and validation/.",
    ),
    PaperDataset(
        "places205",
        "Places205",
        None,
        205,
        test_split="validation",
        evidence=NOWHERE,
        note="The Hub has copies of Places365, which is another set. Get it from http://places.csail.mit.edu and make a"
        " folder a class below train/ and validation/.",
    ),
    PaperDataset(
        "voc07",
        "PASCAL VOC 2007 classification",
        "clip-benchmark/wds_voc2007_multilabel",
        20,
        MEAN_PRECISION,
        image_column=None,
        label_column=None,
        note="webdataset; 2,501 / 4,952 images, while the papers train on trainval (5,011). Several classes an image,"
        " 0 or 1 for each in column npy: to train on, not to be evaluated here yet.",
    ),
    PaperDataset(
        "food-101",
        "Food-101",
        "ethz/food101",
        101,
        test_split="validation",
        note="75,750 / 25,250 images. What the paper calls test is called validation there.",
    ),
    PaperDataset(
        "cifar-10", "CIFAR-10", "uoft-cs/cifar10", 10, image_column="img", evidence=PUBLIC_CODE, note="50,000 / 10,000."
    ),
    PaperDataset(
        "cifar-100",
        "CIFAR-100",
        "uoft-cs/cifar100",
        100,
        image_column="img",
        label_column="fine_label",
        note="50,000 / 10,000 images. Column coarse_label has the 20 superclasses.",
    ),
    PaperDataset(
        "sun397", "SUN397", "tanganke/sun397", 397, note="19,850 / 19,850 images: one of the ten official partitions."
    ),
    PaperDataset("cars", "Stanford Cars", "tanganke/stanford_cars", 196, note="8,144 / 8,041 images."),
    PaperDataset(
        "aircraft",
        "FGVC-Aircraft",
        "HuggingFaceM4/FGVC-Aircraft",
        100,
        MEAN_PER_CLASS,
        label_column="variant",
        revision="e18a7c97147c90dc7f4a60d74a7f4258e9264e97",
        note="The main branch is a script, which `datasets` no longer runs; this commit (refs/pr/1) is the"
        " parquet form. The papers train on --train_split train+validation (6,667), and test on 3,333.",
    ),
    PaperDataset(
        "dtd",
        "Describable Textures",
        "tanganke/dtd",
        47,
        note="3,760 (train and validation of split 1) / 1,880 images.",
    ),
    PaperDataset(
        "pets",
        "Oxford-IIIT Pets",
        "timm/oxford-iiit-pet",
        37,
        MEAN_PER_CLASS,
        note="3,680 / 3,669 images. Column label_cat_dog has the species.",
    ),
    PaperDataset(
        "caltech-101",
        "Caltech-101",
        "dpdl-benchmark/caltech101",
        102,
        MEAN_PER_CLASS,
        evidence=PUBLIC_CODE,
        note="About 3,060 / 6,080 images: 30 a class, one of many such draws; 102 classes with the background.",
    ),
    PaperDataset(
        "flowers",
        "Oxford Flowers 102",
        "dpdl-benchmark/oxford_flowers102",
        102,
        MEAN_PER_CLASS,
        note="1,020 / 6,149 images. The papers train on --train_split train+validation (2,040).",
    ),
    PaperDataset(
        "eurosat",
        "EuroSAT (RGB)",
        "timm/eurosat-rgb",
        10,
        note="16,200 / 5,400 images, and 5,400 for validation; there is no official split.",
    ),
    PaperDataset(
        "imagenette",
        "Imagenette",
        "frgfm/imagenette",
        10,
        config="full_size",
        test_split="validation",
        evidence=PUBLIC_CODE,
        note="9,469 / 3,925 images. Configurations 320px and 160px are smaller copies.",
    ),
    PaperDataset(
        "tiny-imagenet",
        "Tiny ImageNet",
        "zh-plus/tiny-imagenet",
        200,
        test_split="valid",
        note="100,000 / 10,000 images of 64 pixels.",
    ),
)
