<?php

declare(strict_types=1);

namespace Durable\Worker;

/** SQS has no such queue. */
final class QueueAbsent extends \RuntimeException
{
}
