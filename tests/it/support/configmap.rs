//! A ConfigMap volume as the kubelet writes it: the steps, their order and the names were observed on a real one.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Makes, or updates, a ConfigMap volume in `directory` whose only key is `preface.toml`.
pub fn configmap_swap(directory: &Path, content: &str) {
    configmap_swap_keys(directory, &[("preface.toml", content)]);
}

/// The same with these keys and no others: keys that were there before lose their links.
pub fn configmap_swap_keys(directory: &Path, keys: &[(&str, &str)]) {
    static SWAPS: AtomicU64 = AtomicU64::new(1_268_611_272);
    let timestamped = format!("..2026_11_21_02_17_46.{}", SWAPS.fetch_add(1, Ordering::Relaxed));
    let new = directory.join(&timestamped);
    fs::create_dir(&new).unwrap();
    fs::set_permissions(&new, Permissions::from_mode(0o755)).unwrap();
    for (key, content) in keys {
        fs::write(new.join(key), content).unwrap();
        fs::set_permissions(new.join(key), Permissions::from_mode(0o644)).unwrap();
    }

    let data = directory.join("..data");
    let old = fs::read_link(&data).ok();
    symlink(&timestamped, directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), &data).unwrap();

    for (key, _) in keys {
        if directory.join(key).symlink_metadata().is_err() {
            symlink(Path::new("..data").join(key), directory.join(key)).unwrap();
        }
    }
    for entry in fs::read_dir(directory).unwrap() {
        let name = entry.unwrap().file_name();
        let name = name.to_str().unwrap();
        if !name.starts_with("..") && !keys.iter().any(|(key, _)| *key == name) {
            fs::remove_file(directory.join(name)).unwrap();
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(directory.join(old)).unwrap();
    }
}
