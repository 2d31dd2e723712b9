#[hopline::service]
trait Demo {
    #[rpc(idempotent = true)]
    async fn put(&self);
    #[rpc(oneway(yes))]
    async fn set(&self);
}

fn main() {}
