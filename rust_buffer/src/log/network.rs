//! File systems that a log is not kept on.

use std::path::Path;

use rustix::fs::statfs;

use crate::error::{Result, StoreError};

/// Numbers of `statfs` and the names that people know. FUSE is any program's own file system, most of them of a network;
/// virtiofs has its number too.
const NETWORKS: [(u32, &str); 18] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x6573_5546, "FUSE"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9p"),
    (0x1983_0326, "BeeGFS"),
    (0x2003_0528, "OrangeFS"),
    (0xaad7_aaea, "PanFS"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x7461_636f, "OCFS2"),
    (0x0116_1970, "GFS2"),
    (0x786f_4256, "vboxsf"),
];

/// Name of the network file system of type `kind`, None for a local one.
pub fn network_name(kind: u32) -> Option<&'static str> {
    NETWORKS.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name)
}

/// Refuses a directory on a network file system: what flock, maps and fdatasync promise there nobody has proven.
pub(super) fn refuse_network(dir: &Path) -> Result<()> {
    let found = statfs(dir).map_err(|e| StoreError::io(dir, e))?;
    match network_name(found.f_type as u32) {
        Some(name) => Err(StoreError::Network { path: dir.to_path_buf(), name }),
        None => Ok(()),
    }
}
