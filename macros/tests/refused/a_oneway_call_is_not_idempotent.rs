#[hopline::service]
trait Demo {
    #[rpc(idempotent, oneway)]
    async fn put(&self);
}

fn main() {}
