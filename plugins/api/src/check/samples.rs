//! The os-release files that the suite shows to a plugin. They have only the fields that plugins read.

/// The known distributions, by name. Each also represents the distributions that are related to it.
pub fn known() -> Vec<(String, &'static str)> {
    KNOWN
        .iter()
        .map(|text| {
            let field = |name: &str| {
                let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
                value.unwrap_or_default().trim_matches('"')
            };
            (format!("{} {}", field("ID"), field("VERSION_ID")).trim().to_owned(), *text)
        })
        .collect()
}

const KNOWN: [&str; 19] = [
    "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n",
    "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"24.04\"\nVERSION_CODENAME=noble\nPRETTY_NAME=\"Ubuntu 24.04 LTS\"\n",
    "ID=\"amzn\"\nID_LIKE=\"fedora\"\nVERSION_ID=\"2023\"\nPRETTY_NAME=\"Amazon Linux 2023\"\n",
    "ID=\"amzn\"\nID_LIKE=\"centos rhel fedora\"\nVERSION_ID=\"2\"\nPRETTY_NAME=\"Amazon Linux 2\"\n",
    "ID=\"rhel\"\nID_LIKE=\"fedora\"\nVERSION_ID=\"9.4\"\nPRETTY_NAME=\"Red Hat Enterprise Linux 9.4 (Plow)\"\n",
    "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\nPRETTY_NAME=\"Rocky Linux 9.4 (Blue Onyx)\"\n",
    "ID=\"almalinux\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\nPRETTY_NAME=\"AlmaLinux 9.4\"\n",
    "ID=fedora\nVERSION_ID=41\nPRETTY_NAME=\"Fedora Linux 41 (Cloud Edition)\"\n",
    "ID=\"sles\"\nID_LIKE=\"suse\"\nVERSION_ID=\"15.6\"\nPRETTY_NAME=\"SUSE Linux Enterprise Server 15 SP6\"\n",
    "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\nVERSION_ID=\"15.6\"\nPRETTY_NAME=\"openSUSE Leap 15.6\"\n",
    "ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse suse\"\nVERSION_ID=\"20250101\"\n",
    "ID=alpine\nVERSION_ID=3.20.0\nPRETTY_NAME=\"Alpine Linux v3.20\"\n",
    "ID=arch\nBUILD_ID=rolling\nPRETTY_NAME=\"Arch Linux\"\n",
    "ID=manjaro\nID_LIKE=arch\nPRETTY_NAME=\"Manjaro Linux\"\n",
    "ID=\"void\"\nPRETTY_NAME=\"Void Linux\"\n",
    "ID=gentoo\nVERSION_ID=\"2.15\"\nPRETTY_NAME=\"Gentoo Linux\"\n",
    "ID=nixos\nVERSION_ID=\"24.05\"\nPRETTY_NAME=\"NixOS 24.05 (Uakari)\"\n",
    "ID=slackware\nVERSION_ID=15.0\nPRETTY_NAME=\"Slackware 15.0 x86_64\"\n",
    "ID=photon\nVERSION_ID=5.0\nPRETTY_NAME=\"VMware Photon OS/Linux\"\n",
];

/// Systems that no plugin supports.
pub fn unknown() -> [(&'static str, &'static str); 3] {
    [
        ("an empty os-release", ""),
        ("an unknown ID", "ID=oven-check\nVERSION_ID=1\n"),
        (
            "an unknown ID, and names of known systems in other fields",
            "ID=oven-check\nID_LIKE=\"oven-one oven-two\"\n\
             NAME=\"Not debian, ubuntu, fedora, rhel, suse, arch, alpine or void\"\n",
        ),
    ]
}
