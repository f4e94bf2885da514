//! Maps watch targets to nodes and paths of the tree.

use crate::{
    events::{Location, WatchTarget},
    sandbox::SandboxId,
    tree::{DaemonFile, File, Node},
};

/// Returns the node of a target.
pub(super) fn node(target: WatchTarget) -> Node {
    match target {
        WatchTarget::State(row) => Node::File(row, File::State),
        WatchTarget::Events(row) => Node::File(row, File::Events),
        WatchTarget::AllEvents => Node::Daemon(DaemonFile::Events),
        WatchTarget::Gone(row) => Node::Dir(row),
    }
}

/// Returns the files whose pollers are woken when a target has changed. A boot creates the
/// console.
pub(super) fn polled(target: WatchTarget) -> impl Iterator<Item = Node> {
    let console = match target {
        WatchTarget::State(row) => Some(Node::File(row, File::Console)),
        WatchTarget::Events(_) | WatchTarget::AllEvents | WatchTarget::Gone(_) => None,
    };
    std::iter::once(node(target)).chain(console)
}

/// Returns where a target is. `id` is the name of its sandbox, if it has one.
pub(super) fn locate(target: WatchTarget, id: Option<&SandboxId>) -> Location {
    let node = node(target);
    let dir = id.map(SandboxId::to_string).unwrap_or_default();
    let path = match node {
        Node::Root | Node::Dir(_) => dir,
        Node::Daemon(file) => file.name().to_owned(),
        Node::NetDir(_) => format!("{dir}/net"),
        Node::File(_, file) => format!("{dir}/{}", file.path()),
    };
    Location { path, inode: node.inode() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::RowId;

    #[test]
    fn a_target_is_where_its_file_is() {
        let id = "web-1".parse().unwrap();
        for (target, path, inode) in [
            (WatchTarget::State(RowId(3)), "web-1/state", 193),
            (WatchTarget::Events(RowId(3)), "web-1/events", 204),
            (WatchTarget::AllEvents, "dozed.events", 4),
            (WatchTarget::Gone(RowId(3)), "web-1", 192),
        ] {
            assert_eq!(locate(target, Some(&id)), Location { path: path.to_owned(), inode });
        }
    }
}
