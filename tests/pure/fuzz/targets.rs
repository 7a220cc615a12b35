//! The targets: a row for each parser.

use super::parsers::World;
use super::{disks, parsers};
use oven::sys::mount::table;

/// A parser of untrusted bytes.
pub struct Target {
    pub name: &'static str,
    /// The directories with seeds, each with the end of the files' names.
    pub seeds: &'static [(&'static str, &'static str)],
    /// Words of the format. Some inputs contain more of them.
    pub words: &'static [&'static str],
    /// The maximum length of an input in bytes.
    pub longest: usize,
    /// The maximum memory in MiB.
    pub memory_mib: u64,
    /// The maximum CPU time in seconds. Far less is normal, but the machine may be busy, and the tests are not optimised.
    pub seconds: u64,
    /// Parses an input. Returns whether the parser accepted it. Panics if the result is not what callers rely on.
    pub parse: fn(&mut World, &[u8]) -> bool,
}

/// The limits of most targets.
const USUAL: Target = Target {
    name: "",
    seeds: &[],
    words: &[],
    longest: 256 << 10,
    memory_mib: 64,
    seconds: 5,
    parse: |_, _| false,
};

pub const TARGETS: &[Target] = &[
    Target {
        name: "partition-table",
        seeds: &[("tests/data/fuzz/partition-table", "")],
        words: &["EFI PART", "U\u{2a}"],
        longest: 80 << 10,
        parse: disks::partition_table,
        ..USUAL
    },
    Target {
        name: "superblock",
        seeds: &[("tests/data/fuzz/superblock", "")],
        words: &["XFSB", "_BHRfS_M", "LABELONE", "SWAPSPACE2", "FAT32   "],
        longest: 80 << 10,
        parse: disks::superblock,
        ..USUAL
    },
    Target {
        name: "ext-metadata",
        seeds: &[("tests/data/fuzz/ext-metadata", "")],
        longest: 80 << 10,
        parse: disks::ext_metadata,
        ..USUAL
    },
    Target {
        name: "fstab",
        seeds: &[("tests/data/fuzz/fstab", "")],
        words: &[
            "UUID=",
            "LABEL=",
            "/dev/disk/by-label/",
            "\\040",
            "\\x20",
            "nofail",
            "bind",
            "/../",
            ",",
            "\t",
            "\n",
        ],
        parse: parsers::parse_fstab,
        ..USUAL
    },
    Target {
        name: "initramfs",
        seeds: &[("tests/data/fuzz/initramfs", "")],
        words: &["070701", "TRAILER!!!\0", "FFFFFFFF", "00001000", "\0\0\0\0"],
        // The xz decoder may use up to 80 MiB.
        memory_mib: 144,
        parse: parsers::list_initramfs,
        ..USUAL
    },
    Target { name: "lz4", seeds: &[("tests/data/fuzz/lz4", "")], parse: parsers::unpack_lz4, ..USUAL },
    Target {
        name: "deb",
        seeds: &[("tests/data/fuzz/deb", "")],
        words: &["control.tar.xz", "data.tar", "9999999999", "`\n", "Package: ", "Version: ", "./control\0"],
        // The xz decoder may use up to 80 MiB.
        memory_mib: 144,
        parse: parsers::read_package,
        ..USUAL
    },
    Target {
        name: "rpm",
        seeds: &[("tests/data/fuzz/rpm", "")],
        words: &["\0\0\u{3}\u{68}", "\0\0\0\u{6}"],
        parse: parsers::read_package,
        ..USUAL
    },
    Target {
        name: "os-release",
        seeds: &[("tests/data/fuzz/os-release", "")],
        words: &["ID=", "ID_LIKE=", "VERSION_ID=", "fedora", "debian", "suse", "\"", "'", "\\", "\n"],
        parse: parsers::read_os_release,
        ..USUAL
    },
    Target {
        name: "accounts",
        seeds: &[("tests/data/fuzz/accounts", "")],
        words: &["root", ":", "\n", "/home/", "4294967296", "-1"],
        parse: parsers::read_accounts,
        ..USUAL
    },
    Target {
        name: "image-toml",
        seeds: &[("tests/data/definitions", "whole.toml"), ("tests/data/definitions", "least.toml")],
        words: &[
            "[[run]]\n",
            "[[file]]\n",
            "source = ",
            "\"\"\"",
            "'''",
            "{ ",
            "[",
            "\\u0000",
            "1e9",
            "0x7f",
            "${x}",
        ],
        longest: 32 << 10,
        parse: parsers::load_definition,
        ..USUAL
    },
    Target {
        name: "oven-toml",
        seeds: &[("tests/data/settings", "whole.toml"), ("tests/data/settings", "aws.toml")],
        words: &["[network]\n", "cloud = ", "cache_gib = ", "18446744073709551616", "-1", "\"", "[", "{"],
        longest: 32 << 10,
        parse: parsers::load_settings,
        ..USUAL
    },
    Target {
        name: "template",
        seeds: &[("tests/data/fuzz/template", "")],
        words: &[
            "{{ ",
            " }}",
            "{% ",
            " %}",
            "{% for x in range(9) %}",
            "{% endfor %}",
            "|indent(",
            "|replace('x', 'y' * 9)",
            "|slice(",
            "|batch(",
            "|format(1)",
            "|join",
            "|list",
            "|repeat",
            " * ",
            " ~ ",
            "%99d",
            "[::-1]",
            "(",
            ")",
        ],
        longest: 32 << 10,
        parse: parsers::render_template,
        ..USUAL
    },
    Target {
        name: "plugin-answer",
        seeds: &[
            ("plugins/examples/tiny.golden", ".answer.json"),
            ("plugins/examples/void.golden", ".answer.json"),
        ],
        words: &[
            "\"argv\":",
            "\"phase\":",
            "{",
            "[",
            "null",
            "1e400",
            "\"\\ud800\"",
            "\"/run/oven/packages\"",
            "../",
        ],
        parse: parsers::read_plugin_answer,
        ..USUAL
    },
    Target {
        name: "plugin-request",
        seeds: &[("tests/data/fuzz/plugin-request", "")],
        words: &[
            "\"name\":",
            "\"*\"",
            "\"-y\"",
            "\"\\u0000\"",
            "fedora",
            "debian",
            "amzn",
            "\"upgrade\":\"security\"",
        ],
        longest: 32 << 10,
        parse: parsers::answer_plugin_request,
        ..USUAL
    },
    Target {
        name: "packages",
        seeds: &[("tests/data/fuzz/packages", "")],
        words: &[
            "\t",
            "\n",
            "installed",
            "config-files",
            ", ",
            "mawk",
            "dpkg-query: warning: ",
            "\n\n",
            "\r\n",
        ],
        parse: parsers::list_packages,
        ..USUAL
    },
    Target {
        name: "held-packages",
        seeds: &[("tests/data/fuzz/held-packages", "")],
        words: &[":i386", "\n", "W: ", "\r\n", "\t"],
        parse: parsers::list_held_packages,
        ..USUAL
    },
    Target {
        name: "step-output",
        seeds: &[("tests/data/fuzz/step-output", "")],
        words: &[
            "hunter2-hunter2",
            "\r",
            "\n",
            "\u{1b}[",
            "\u{1b}]0;",
            "\u{9b}",
            "\u{202e}",
            "E: ",
            "Unable to locate package ",
        ],
        parse: parsers::read_step_output,
        ..USUAL
    },
    Target {
        name: "mountinfo",
        seeds: &[("tests/data/fuzz/mountinfo", "")],
        words: &[" - ", "\\040", "shared:1", "\n", "18446744073709551615:4294967295"],
        parse: |_, input| !table::parse(input).is_empty(),
        ..USUAL
    },
    Target {
        name: "boot-text",
        seeds: &[("tests/data/fuzz/boot-text", "")],
        words: &[
            "/dev/",
            "root=UUID=",
            "search --fs-uuid ",
            "=LABEL=",
            "/dev/disk/by-id/",
            "\\x20",
            " ",
            "\n",
            "'",
        ],
        longest: 64 << 10,
        parse: parsers::lint_boot_text,
        ..USUAL
    },
    Target {
        name: "inputs",
        seeds: &[("tests/data/fuzz/inputs", "")],
        words: &["v1;", ";f;", ";0;", "\"sha1\":", "\"link\":", "null"],
        parse: parsers::explain_inputs,
        ..USUAL
    },
    Target {
        name: "region",
        seeds: &[("tests/data/fuzz/region", "")],
        words: &["18446744073709551615", "null", "\"tags\":", "{", "["],
        longest: 32 << 10,
        parse: parsers::read_region,
        ..USUAL
    },
];

/// The following targets have a fault if the input contains this byte. Their seed does not contain it.
pub const FAULT: u8 = 0xff;

/// The limits of the targets that have a fault on purpose. They show that the fuzzer notices each kind of fault.
const FAULTY: Target =
    Target { seeds: &[("tests/data/fuzz/accounts", "")], longest: 4096, memory_mib: 16, seconds: 1, ..USUAL };

pub const PANICS: Target =
    Target { name: "panics", parse: |_, input| fault(input, || panic!("as it should")), ..FAULTY };
pub const ALLOCATES: Target = Target {
    name: "allocates",
    parse: |_, input| fault(input, || assert_eq!(std::hint::black_box(vec![1_u8; 64 << 20])[0], 1)),
    ..FAULTY
};
pub const LOOPS: Target = Target {
    name: "loops",
    parse: |_, input| {
        fault(input, || {
            let mut turns = 0_u64;
            while std::hint::black_box(turns) < u64::MAX {
                turns += 1;
            }
        })
    },
    ..FAULTY
};
pub const RECURSES: Target =
    Target { name: "recurses", parse: |_, input| fault(input, || assert!(depth(1) > 0)), ..FAULTY };

fn fault(input: &[u8], fault: impl FnOnce()) -> bool {
    if input.contains(&FAULT) {
        fault();
    }
    true
}

fn depth(level: u64) -> u64 {
    if std::hint::black_box(level) == 0 { 0 } else { depth(level + 1) + 1 }
}

/// Returns a target by its name.
pub fn find(name: &str) -> &'static Target {
    const FAULTY: [Target; 4] = [PANICS, ALLOCATES, LOOPS, RECURSES];
    let mut all = TARGETS.iter().chain(&FAULTY);
    all.find(|target| target.name == name).unwrap_or_else(|| panic!("no target is {name}"))
}
