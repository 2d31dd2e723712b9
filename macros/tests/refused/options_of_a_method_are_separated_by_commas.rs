#[hopline::service]
trait Demo {
    #[rpc(idempotent timeout = "2s")]
    async fn put(&self);
}

fn main() {}
