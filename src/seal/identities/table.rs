//! The identities and secrets that scripts of packages make for one machine.

/// An identity or a secret of one machine. Each instance needs its own.
pub struct PackageIdentity {
    pub what: &'static str,
    /// The name of the unit that makes it, without its suffix, if oven adds the unit.
    pub unit: &'static str,
    pub files: &'static [IdentityFile],
    /// Machines of one cluster or service may share the files on purpose. So they are removed only if a package's script
    /// made them in this bake.
    pub may_be_shared: bool,
    /// Public parts that belong to the files, such as certificates. They are removed if all files are removed.
    pub public: &'static [&'static str],
    pub maker: Maker,
}

pub struct IdentityFile {
    pub path: &'static str,
    /// The file has an identity only if one of its lines begins with this text. Empty means that it always has.
    pub line: &'static str,
    /// The name of a shell variable in the file. The file remains, and only the variable's value is removed.
    pub variable: Option<&'static str>,
    /// The shell command that makes the file, or the variable's value. `{file}` stands for the path.
    pub command: &'static str,
}

/// What makes the identity again at the first boot.
pub enum Maker {
    /// The program that uses the files makes them when it starts.
    User,
    /// A unit of the image.
    Unit(&'static str),
    /// A unit that oven adds. It needs one of these programs, and runs before these units.
    Added { programs: &'static [&'static str], before: &'static str },
}

const fn file(path: &'static str, command: &'static str) -> IdentityFile {
    IdentityFile { path, line: "", variable: None, command }
}

/// This makes the keys and the certificates that are missing.
const UNBOUND_SETUP: &str = "unbound-control-setup -d /etc/unbound";

pub const IDENTITIES: &[PackageIdentity] = &[
    PackageIdentity {
        what: "an NVMe host id",
        unit: "oven-nvme-host-id",
        // The id is the end of the qualified name.
        files: &[
            file("/etc/nvme/hostnqn", "nvme gen-hostnqn > {file}"),
            file(
                "/etc/nvme/hostid",
                "if [ -s /etc/nvme/hostnqn ]; then cat /etc/nvme/hostnqn; else nvme gen-hostnqn; fi | \
                 sed \"s/.*uuid://\" > {file}",
            ),
        ],
        may_be_shared: false,
        public: &[],
        maker: Maker::Added {
            programs: &["/usr/sbin/nvme", "/sbin/nvme"],
            before: "nvmefc-boot-connections.service nvmf-autoconnect.service",
        },
    },
    PackageIdentity {
        what: "an iSCSI initiator name",
        unit: "oven-iscsi-initiator",
        files: &[IdentityFile {
            line: "InitiatorName=",
            // If the program fails, there must be no file with an empty name, because the unit would not run again.
            ..file(
                "/etc/iscsi/initiatorname.iscsi",
                "name=$(iscsi-iname) && echo \"InitiatorName=$name\" > {file}",
            )
        }],
        may_be_shared: false,
        public: &[],
        maker: Maker::Added {
            programs: &["/usr/sbin/iscsi-iname", "/sbin/iscsi-iname"],
            before: "iscsid.socket iscsid.service iscsi-init.service iscsi.service open-iscsi.service",
        },
    },
    PackageIdentity {
        what: "BIND's control key",
        unit: "oven-rndc-key",
        files: &[
            file("/etc/bind/rndc.key", "rndc-confgen -a -c {file}"),
            file("/etc/rndc.key", "rndc-confgen -a -c {file}"),
        ],
        may_be_shared: true,
        public: &[],
        maker: Maker::Added {
            programs: &["/usr/sbin/rndc-confgen", "/usr/bin/rndc-confgen"],
            before: "named-setup-rndc.service named.service bind9.service",
        },
    },
    PackageIdentity {
        what: "the id of popularity-contest",
        unit: "oven-popularity-contest-id",
        files: &[IdentityFile {
            line: "MY_HOSTID=",
            variable: Some("MY_HOSTID"),
            ..file(
                "/etc/popularity-contest.conf",
                "sed -i \"s/^MY_HOSTID=\\\"\\\"\\$/MY_HOSTID=\\\"$(tr -d - < /proc/sys/kernel/random/uuid)\\\"/\" {file}",
            )
        }],
        may_be_shared: false,
        public: &[],
        maker: Maker::Added { programs: &["/usr/bin/sed", "/bin/sed"], before: "cron.service" },
    },
    PackageIdentity {
        what: "Docker's identity",
        unit: "",
        files: &[file("/etc/docker/key.json", ""), file("/var/lib/docker/engine-id", "")],
        may_be_shared: false,
        public: &[],
        maker: Maker::User,
    },
    PackageIdentity {
        what: "the id of an Open vSwitch system",
        unit: "",
        files: &[file("/etc/openvswitch/system-id.conf", "")],
        may_be_shared: false,
        public: &[],
        maker: Maker::User,
    },
    PackageIdentity {
        what: "the cookie with which RabbitMQ's nodes trust each other",
        unit: "oven-rabbitmq-cookie",
        files: &[file("/var/lib/rabbitmq/.erlang.cookie", "head -c 42 /dev/urandom | base64 -w 0 > {file}")],
        may_be_shared: true,
        public: &[],
        maker: Maker::Added {
            programs: &["/usr/bin/base64", "/bin/base64"],
            before: "epmd.service rabbitmq-server.service",
        },
    },
    PackageIdentity {
        what: "the keys of unbound-control",
        unit: "oven-unbound-control-keys",
        files: &[
            file("/etc/unbound/unbound_server.key", UNBOUND_SETUP),
            file("/etc/unbound/unbound_control.key", UNBOUND_SETUP),
            file("/etc/unbound/unbound_server.pem", UNBOUND_SETUP),
            file("/etc/unbound/unbound_control.pem", UNBOUND_SETUP),
        ],
        may_be_shared: true,
        public: &[],
        maker: Maker::Added {
            programs: &["/usr/sbin/unbound-control-setup", "/usr/bin/unbound-control-setup"],
            before: "unbound-keygen.service unbound.service",
        },
    },
    PackageIdentity {
        what: "the host keys of Dropbear",
        unit: "oven-dropbear-keys",
        files: &[
            file("/etc/dropbear/dropbear_rsa_host_key", "dropbearkey -t rsa -f {file}"),
            file("/etc/dropbear/dropbear_dss_host_key", "dropbearkey -t dss -f {file}"),
            file("/etc/dropbear/dropbear_ecdsa_host_key", "dropbearkey -t ecdsa -f {file}"),
            file("/etc/dropbear/dropbear_ed25519_host_key", "dropbearkey -t ed25519 -f {file}"),
        ],
        may_be_shared: false,
        public: &[],
        maker: Maker::Added {
            programs: &["/usr/bin/dropbearkey", "/bin/dropbearkey"],
            before: "dropbear.socket dropbear.service",
        },
    },
    PackageIdentity {
        what: "xrdp's key",
        unit: "oven-xrdp-key",
        files: &[file("/etc/xrdp/rsakeys.ini", "xrdp-keygen xrdp {file}")],
        may_be_shared: false,
        public: &[],
        maker: Maker::Added {
            programs: &["/usr/bin/xrdp-keygen", "/bin/xrdp-keygen"],
            before: "xrdp.service",
        },
    },
    PackageIdentity {
        what: "the key of Apache's default certificate",
        unit: "",
        files: &[file("/etc/pki/tls/private/localhost.key", "")],
        may_be_shared: true,
        public: &["/etc/pki/tls/certs/localhost.crt"],
        maker: Maker::Unit("httpd-init.service"),
    },
    PackageIdentity {
        what: "the key of Dovecot's default certificate",
        unit: "",
        files: &[file("/etc/pki/dovecot/private/dovecot.pem", "")],
        may_be_shared: true,
        public: &["/etc/pki/dovecot/certs/dovecot.pem"],
        maker: Maker::Unit("dovecot-init.service"),
    },
];
