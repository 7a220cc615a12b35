//! Wrong inputs of oven.toml.

use super::TomlCase;

pub const CASES: &[TomlCase] = &[
    ("cloud", "cloud = \"gcp\"", 1, "local"),
    ("region_dir", "region_dir = \"\"", 1, "it should be a path"),
    ("region", "region = \"eu central\"", 1, "eu-central-1"),
    ("instance_id", "instance_id = \"i-12\"", 1, "17 (or 8) digits"),
    ("zone", "zone = \"eu-central-1\"", 1, "the zone's letter"),
    ("disks", "disks = \"fast\"", 1, "`attached` or `direct`"),
    ("cache_gib", "cache_gib = 0", 1, "GiB"),
    ("network", "network = true", 1, "[network]"),
    ("network.proxy", "[network]\nproxy = \"proxy:3128\"", 2, "does not begin with"),
    ("network.no_proxy", "[network]\nno_proxy = \"a b\"", 2, "separated by commas"),
    ("network.mirror", "[network]\nmirror = \"ftp://x.example\"", 2, "`https://`"),
    ("network.ca_file", "[network]\nca_file = \"gone.pem\"", 2, "gone.pem"),
    ("limits", "limits = 1", 1, "[limits]"),
    ("limits.memory_gib", "[limits]\nmemory_gib = 0", 2, "GiB"),
    ("limits.pids", "[limits]\npids = 1", 2, "processes"),
    ("proxy", "proxy = \"http://x.example\"", 1, "unknown key"),
    ("cloud", "cloud = ", 1, "not valid TOML"),
];
