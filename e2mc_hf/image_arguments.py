"""Options about images: which ones, and how their views are drawn."""

from dataclasses import dataclass, replace

from e2mc_hf.option_fields import option, require

BUILDERS = ("parquet", "webdataset", "imagefolder")


@dataclass
class DataArguments:
    """Which images."""

    dataset: str = option(
        "digits",
        "digits, a name in e2mc_hf/DATASETS.md, a Hub id, or a folder (parquet, tar, images).",
    )
    dataset_config: str | None = option(None, "Configuration of the Hub dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the Hub dataset.")
    data_files: str | list[str] | None = option(
        None, "Files, globs or URLs, of the kind `dataset`: parquet, webdataset, imagefolder."
    )
    train_split: str = option("train", "Split to train on, or to fit the probes on; a+b is both.")
    image_column: str | None = option(None, "Column of the images; found by its feature type when not given.")
    label_column: str | None = option(None, "Column of the labels (evaluation only); found by its type when not given.")
    max_samples: int | None = option(
        None, "Use the first `max_samples` images of a seeded shuffle; all when not given."
    )
    file_list: str | None = option(None, "Text file with the file names of the only images to use (ImageNet's 1%).")
    streaming: bool = option(False, "Read while training, nothing copied first; parquet, webdataset or images.")
    shuffle_window: int = option(1000, "Images of a stream that are shuffled together.")
    lanes: int | None = option(None, "Places a stream is read from at once, over all processes; one each by default.")
    max_unreadable_share: float = option(0.01, "Share of unreadable images, of 1,000 or more, that stops the run.")

    def __post_init__(self) -> None:
        require(
            self.max_samples is None or self.max_samples >= 1,
            "max_samples",
            "must be at least 1",
            self.max_samples,
            "Leave it out to use every image.",
        )
        require(
            self.shuffle_window >= 1,
            "shuffle_window",
            "must be at least 1",
            self.shuffle_window,
            "1 shuffles little more than a batch.",
        )
        require(
            self.lanes is None or self.lanes >= 1,
            "lanes",
            "must be at least 1",
            self.lanes,
            "Pass a multiple of the processes; more mix better when the files are sorted.",
        )
        require(
            0 <= self.max_unreadable_share <= 1,
            "max_unreadable_share",
            "must lie between 0 and 1",
            self.max_unreadable_share,
            "0 stops at the first, 1 never.",
        )
        self._check_files()
        self._check_streaming()

    def _check_files(self) -> None:
        """Builder's name and files belong together."""
        require(
            self.data_files is None or bool(self.data_files),
            "data_files",
            "must name at least one file",
            self.data_files,
            "Leave it out to read all of `dataset`.",
        )
        require(
            self.data_files is None or self.dataset != "digits",
            "data_files",
            "must come with a `dataset` that says what they are",
            self.data_files,
            f"Pass --dataset with one of {', '.join(BUILDERS)}.",
        )
        require(
            self.data_files is not None or self.dataset not in BUILDERS,
            "dataset",
            "must come with `data_files` when it is the name of a format",
            self.dataset,
            f"Pass --data_files, or ./{self.dataset} for a folder of that name.",
        )

    def _check_streaming(self) -> None:
        """What a stream, read in order and once, cannot do, and what only a stream can."""
        require(
            self.streaming or self.lanes is None,
            "lanes",
            "has no effect without streaming",
            self.lanes,
            "Leave it out.",
        )
        require(
            not (self.streaming and self.dataset == "digits"),
            "streaming",
            "must be off for `digits`, which are in memory",
            self.streaming,
            "Leave it out.",
        )
        for name in ("max_samples", "file_list"):
            value = getattr(self, name)
            require(
                not self.streaming or value is None,
                name,
                "must be left out with `streaming`, which reads every image there is",
                value,
                "Leave out one of the two.",
            )


@dataclass
class ViewArguments:
    """How the views of an image are drawn; the defaults are VICReg's recipe for photographs.

    Large views come first, then the small ones of multi-crop. A list holds one value for every view, or one for every
    large view, of which the last counts for the small ones too; one value alone counts for all.
    """

    num_views: int = option(2, "Large views of each image.")
    image_size: int | None = option(None, "Side of a large view in pixels; the encoder's own when not given.")
    crop_scale: list[float] = option([0.08, 1.0], "Range of the crop's share of the image area.")
    num_small_views: int | None = option(None, "Small views of each image; the objective's own number when not given.")
    small_image_size: int = option(96, "Side of a small view in pixels; a multiple of the patch size.")
    small_crop_scale: list[float] = option([0.05, 0.14], "Range of a small crop's share of the image area.")
    interpolation: str | None = option(None, "bilinear or bicubic crops; the encoder's own when not given.")
    flip_prob: float = option(0.5, "Probability of a horizontal flip.")
    rotation_degrees: float = option(0.0, "Largest rotation to either side, in degrees.")
    jitter_prob: float = option(0.8, "Probability of color jitter.")
    jitter_strength: list[float] = option([0.4, 0.4, 0.2, 0.1], "Brightness, contrast, saturation, hue of the jitter.")
    grayscale_prob: float = option(0.2, "Probability of grayscale.")
    blur_prob: list[float] = option([1.0, 0.1], "Probability of Gaussian blur, one value a view.")
    blur_sigma: list[float] = option([0.1, 2.0], "Range of the blur's standard deviation, in pixels.")
    solarize_prob: list[float] = option([0.0, 0.2], "Probability of solarization, one value a view.")
    show_views: str | None = option(None, "Write some images and their views to this PNG file, and do not train.")

    def __post_init__(self) -> None:
        require(self.num_views >= 2, "num_views", "must be at least 2", self.num_views, "Pass --num_views 2 or more.")
        require(
            self.num_small_views is None or self.num_small_views >= 0,
            "num_small_views",
            "must not be negative",
            self.num_small_views,
            "Pass 0 for large views alone.",
        )
        require(
            self.image_size is None or self.image_size >= 8,
            "image_size",
            "must be at least 8 pixels",
            self.image_size,
            "Leave it out to use the encoder's own size.",
        )
        require(
            self.small_image_size >= 8,
            "small_image_size",
            "must be at least 8 pixels",
            self.small_image_size,
            "The papers' is 96.",
        )
        require(
            self.interpolation in (None, "bilinear", "bicubic"),
            "interpolation",
            "must be bilinear or bicubic",
            self.interpolation,
            "Leave it out to use the encoder's own.",
        )
        require(
            self.rotation_degrees >= 0, "rotation_degrees", "must not be negative", self.rotation_degrees, "0 is off."
        )
        for name, most, example in (
            ("crop_scale", 1, "0.08 1.0"),
            ("small_crop_scale", 1, "0.05 0.14"),
            ("blur_sigma", 100, "0.1 2.0"),
        ):
            value = getattr(self, name)
            low, high = value if len(value) == 2 else (0.0, 0.0)
            require(
                0 < low <= high <= most,
                name,
                f"must be two numbers with 0 < low <= high <= {most}",
                value,
                f"Pass --{name} {example}, for example.",
            )
        require(
            len(self.jitter_strength) == 4
            and all(strength >= 0 for strength in self.jitter_strength)
            and self.jitter_strength[3] <= 0.5,
            "jitter_strength",
            "must be four non-negative numbers, the last at most 0.5",
            self.jitter_strength,
            "Pass brightness, contrast, saturation and hue.",
        )
        large, every = self.num_views, self.num_views + (self.num_small_views or 0)
        views = f"{large} large views or of all {every} views" if every > large else f"{large} views"
        for name in ("blur_prob", "solarize_prob"):
            value = getattr(self, name)
            for_small = every == large < len(value)
            require(
                len(value) in (1, large, every),
                name,
                f"must hold one value, or one for each of the {views}",
                value,
                "Pass --num_small_views to give small ones values of their own."
                if for_small
                else "Pass one number to use it for every view.",
            )
        for name in ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"):
            value = getattr(self, name)
            require(
                all(0 <= prob <= 1 for prob in (value if isinstance(value, list) else [value])),
                name,
                "must lie between 0 and 1",
                value,
                "It is a probability.",
            )

    def resolved(self, default_small_views: int) -> "ViewArguments":
        """Copy in which the number of small views is a number: the user's, or else the objective's own.

        Raises:
            UsageError: If a list does not fit that number.
        """
        return replace(self, num_small_views=default_small_views) if self.num_small_views is None else replace(self)

    def of_each_view(self, values: list[float]) -> list[float]:
        """Spread a list over all views, large ones first."""
        values = values * self.num_views if len(values) == 1 else values
        return values + values[-1:] * (self.num_views + (self.num_small_views or 0) - len(values))
