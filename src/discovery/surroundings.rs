//! What the machine says of its names: for the warnings of `check`, of a start and of a reload.

use std::net::IpAddr;

use super::files::Files;
use crate::config::hints::Surroundings;
use crate::net::check::is_foreign;

/// As they are here and now.
pub fn here() -> Surroundings {
    let (search, ndots) = match &*Files::default().resolv() {
        Ok(resolv) => (resolv.search.clone(), resolv.ndots),
        Err(_) => (Vec::new(), 1),
    };
    // The kubelet tells every pod the address of the API server's Service.
    let service = std::env::var("KUBERNETES_SERVICE_HOST").ok().and_then(|text| text.parse::<IpAddr>().ok());
    Surroundings { search, ndots, service, elsewhere: false, is_foreign: Some(is_foreign) }
}

/// The same for a file that may be for another machine.
pub fn for_check() -> Surroundings {
    let here = here();
    Surroundings { elsewhere: here.service.is_none(), ..here }
}
